//! GPT-2 (Radford et al., 2019) as transformers' `GPT2Model` defines it: LayerNorm before each
//! block, learned positions, one Conv1D for queries, keys and values, an MLP with `gelu_new`.

use super::architecture::{Architecture, Head, gelu, unsupported};
use super::names::Family;
use super::transformer::{Activation, NormKind, Placement};
use crate::error::Result;
use crate::folder::ConfigFile;

pub(super) fn read(file: &ConfigFile) -> Result<Architecture> {
    let hidden_size = file.usize_or("n_embd", 768)?;
    let num_attention_heads = file.usize_or("n_head", 12)?;
    for (key, neutral) in [
        ("scale_attn_weights", true),
        ("scale_attn_by_inverse_layer_idx", false),
        ("add_cross_attention", false),
    ] {
        if file.bool_or(key, neutral)? != neutral {
            let what = format!("{key}={}", !neutral);
            return Err(unsupported(file, &what, &format!("{neutral} is")));
        }
    }
    Ok(Architecture {
        family: Family::Gpt2,
        class: String::new(),
        head: Head::Language,
        hidden_size,
        intermediate_size: file.usize_or("n_inner", 4 * hidden_size)?,
        num_hidden_layers: file.usize_or("n_layer", 12)?,
        num_attention_heads,
        num_key_value_heads: num_attention_heads,
        head_dim: hidden_size / num_attention_heads.max(1),
        vocab_size: file.usize_or("vocab_size", 50_257)?,
        max_position_embeddings: file.usize_or("n_positions", 1024)?,
        type_vocab_size: 0,
        norm: NormKind::Layer,
        norm_eps: file.f64_or("layer_norm_epsilon", 1e-5)? as f32,
        placement: Placement::Before,
        activation: Activation::Gelu(gelu(file, "activation_function", "gelu_new")?),
        rope: None,
        tie_word_embeddings: file.bool_or("tie_word_embeddings", true)?,
        attention_bias: true,
        mlp_bias: true,
        bos_token_id: file.token_ids("bos_token_id")?.first().copied(),
        eos_token_ids: file.token_ids("eos_token_id")?,
    })
}
