//! BERT (Devlin et al., 2018) as transformers' `BertModel` defines it: LayerNorm after each block,
//! learned positions and token types, attention to the whole row, a pooler on the first token.

use super::architecture::{Architecture, Head, gelu, unsupported};
use super::names::Family;
use super::transformer::{Activation, NormKind, Placement};
use crate::error::Result;
use crate::folder::ConfigFile;

pub(super) fn read(file: &ConfigFile) -> Result<Architecture> {
    let hidden_size = file.usize("hidden_size")?;
    let num_attention_heads = file.usize("num_attention_heads")?;
    if let Some(kind) = file.str_opt("position_embedding_type")?
        && kind != "absolute"
    {
        let what = format!("position_embedding_type {kind}");
        return Err(unsupported(file, &what, "absolute is"));
    }
    for key in ["is_decoder", "add_cross_attention"] {
        if file.bool_or(key, false)? {
            return Err(unsupported(file, &format!("{key}=true"), "false is"));
        }
    }
    Ok(Architecture {
        family: Family::Bert,
        class: String::new(),
        head: Head::Language,
        hidden_size,
        intermediate_size: file.usize("intermediate_size")?,
        num_hidden_layers: file.usize("num_hidden_layers")?,
        num_attention_heads,
        num_key_value_heads: num_attention_heads,
        head_dim: hidden_size / num_attention_heads.max(1),
        vocab_size: file.usize("vocab_size")?,
        max_position_embeddings: file.usize_or("max_position_embeddings", 512)?,
        type_vocab_size: file.usize_or("type_vocab_size", 2)?,
        norm: NormKind::Layer,
        norm_eps: file.f64_or("layer_norm_eps", 1e-12)? as f32,
        placement: Placement::After,
        activation: Activation::Gelu(gelu(file, "hidden_act", "gelu")?),
        rope: None,
        tie_word_embeddings: true,
        attention_bias: true,
        mlp_bias: true,
        bos_token_id: None,
        eos_token_ids: Vec::new(),
    })
}
