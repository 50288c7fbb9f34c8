//! What each family calls its modules.

/// A kind of model: its modules' names and its mathematics.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    Llama,
    Gpt2,
    Bert,
}

/// Names of a family's modules: those of a layer below the layer's own, the outer ones below `base`.
#[derive(Debug)]
pub struct Names {
    /// The model inside a class with a head.
    pub base: &'static str,
    pub tokens: &'static str,
    /// Learned positions.
    pub positions: Option<&'static str>,
    pub types: Option<&'static str>,
    pub embedding_norm: Option<&'static str>,
    /// The list of layers.
    pub layers: &'static str,
    /// What the attention's and the MLP's modules have in common.
    pub attention: &'static str,
    pub mlp: &'static str,
    /// Queries, keys and values in this order.
    pub qkv: &'static [&'static str],
    pub o: &'static str,
    pub attention_norm: &'static str,
    /// Gate and up, or up alone.
    pub up: &'static [&'static str],
    pub down: &'static str,
    pub mlp_norm: &'static str,
    /// The norm after the last layer.
    pub norm: Option<&'static str>,
    pub pooler: Option<&'static str>,
    /// The classification head, which stands beside the base.
    pub classifier: &'static str,
    /// Modules without weights that a pattern may match: of a layer, and outer ones.
    pub silent: (&'static [&'static str], &'static [&'static str]),
}

const LLAMA: Names = Names {
    base: "model",
    tokens: "embed_tokens",
    positions: None,
    types: None,
    embedding_norm: None,
    layers: "layers",
    attention: "self_attn",
    mlp: "mlp",
    qkv: &["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    o: "self_attn.o_proj",
    attention_norm: "input_layernorm",
    up: &["mlp.gate_proj", "mlp.up_proj"],
    down: "mlp.down_proj",
    mlp_norm: "post_attention_layernorm",
    norm: Some("norm"),
    pooler: None,
    classifier: "score",
    silent: (&["mlp.act_fn"], &["rotary_emb"]),
};

const GPT2: Names = Names {
    base: "transformer",
    tokens: "wte",
    positions: Some("wpe"),
    types: None,
    embedding_norm: None,
    layers: "h",
    attention: "attn",
    mlp: "mlp",
    qkv: &["attn.c_attn"],
    o: "attn.c_proj",
    attention_norm: "ln_1",
    up: &["mlp.c_fc"],
    down: "mlp.c_proj",
    mlp_norm: "ln_2",
    norm: Some("ln_f"),
    pooler: None,
    classifier: "score",
    silent: (
        &[
            "attn.attn_dropout",
            "attn.resid_dropout",
            "mlp.act",
            "mlp.dropout",
        ],
        &["drop"],
    ),
};

const BERT: Names = Names {
    base: "bert",
    tokens: "embeddings.word_embeddings",
    positions: Some("embeddings.position_embeddings"),
    types: Some("embeddings.token_type_embeddings"),
    embedding_norm: Some("embeddings.LayerNorm"),
    layers: "encoder.layer",
    attention: "attention",
    mlp: "output",
    qkv: &[
        "attention.self.query",
        "attention.self.key",
        "attention.self.value",
    ],
    o: "attention.output.dense",
    attention_norm: "attention.output.LayerNorm",
    up: &["intermediate.dense"],
    down: "output.dense",
    mlp_norm: "output.LayerNorm",
    norm: None,
    pooler: Some("pooler.dense"),
    classifier: "classifier",
    silent: (
        &[
            "attention.self.dropout",
            "attention.output.dropout",
            "intermediate.intermediate_act_fn",
            "output.dropout",
        ],
        &["embeddings.dropout", "pooler.activation"],
    ),
};

/// The language model's output layer, in every family that has one.
pub const LM_HEAD: &str = "lm_head";

impl Family {
    pub fn names(self) -> &'static Names {
        match self {
            Self::Llama => &LLAMA,
            Self::Gpt2 => &GPT2,
            Self::Bert => &BERT,
        }
    }

    /// Whether linear weights are stored `[k, n]`: transformers' Conv1D.
    pub fn is_transposed(self) -> bool {
        self == Self::Gpt2
    }

    /// Whether a token sees only those before it.
    pub fn is_causal(self) -> bool {
        self != Self::Bert
    }

    /// The class of the family with a classification head.
    pub fn classification_class(self) -> &'static str {
        match self {
            Self::Llama => "LlamaForSequenceClassification",
            Self::Gpt2 => "GPT2ForSequenceClassification",
            Self::Bert => "BertForSequenceClassification",
        }
    }
}

impl Names {
    /// An outer module's full name.
    pub fn outer(&self, module: &str) -> String {
        format!("{}.{module}", self.base)
    }

    /// A layer's full name.
    pub fn layer(&self, at: usize) -> String {
        format!("{}.{}.{at}", self.base, self.layers)
    }
}
