//! Llama (Touvron et al., 2023) as transformers' `LlamaModel` defines it: RMSNorm before each
//! block, grouped-query attention with rotary embedding, SwiGLU, optionally tied embeddings.

use super::architecture::{Architecture, Head};
use super::names::Family;
use super::transformer::{Activation, NormKind, Placement};
use crate::engine::ops::rope::Scaling;
use crate::error::{Error, Result};
use crate::folder::ConfigFile;

pub(super) fn read(file: &ConfigFile) -> Result<Architecture> {
    let hidden_size = file.usize("hidden_size")?;
    let num_attention_heads = file.usize("num_attention_heads")?;
    let num_key_value_heads = file.usize_or("num_key_value_heads", num_attention_heads)?;
    let head_dim = match file.usize_opt("head_dim")? {
        Some(size) => size,
        None => hidden_size / num_attention_heads.max(1),
    };
    let activation = file.str_opt("hidden_act")?.unwrap_or("silu");
    if activation != "silu" {
        return Err(file.wrong("hidden_act", "\"silu\""));
    }
    Ok(Architecture {
        family: Family::Llama,
        class: String::new(),
        head: Head::Language,
        hidden_size,
        intermediate_size: file.usize("intermediate_size")?,
        num_hidden_layers: file.usize("num_hidden_layers")?,
        num_attention_heads,
        num_key_value_heads,
        head_dim,
        vocab_size: file.usize("vocab_size")?,
        max_position_embeddings: file.usize_or("max_position_embeddings", 2048)?,
        type_vocab_size: 0,
        norm: NormKind::Rms,
        norm_eps: file.f64_or("rms_norm_eps", 1e-6)? as f32,
        placement: Placement::Before,
        activation: Activation::SwiGlu,
        rope: Some(rope(file)?),
        tie_word_embeddings: file.bool_or("tie_word_embeddings", false)?,
        attention_bias: file.bool_or("attention_bias", false)?,
        mlp_bias: file.bool_or("mlp_bias", false)?,
        bos_token_id: file.token_ids("bos_token_id")?.first().copied(),
        eos_token_ids: file.token_ids("eos_token_id")?,
    })
}

/// Base and scaling of the rotary embedding: transformers 5 writes `rope_parameters`, 4 wrote
/// `rope_theta` and `rope_scaling`.
fn rope(file: &ConfigFile) -> Result<(f64, Scaling)> {
    let section = match file.section("rope_parameters")? {
        Some(section) => Some(section),
        None => file.section("rope_scaling")?,
    };
    let flat = file.f64_or("rope_theta", 10_000.0)?;
    let Some(section) = section else {
        return Ok((flat, Scaling::Default));
    };
    let theta = section.f64_or("rope_theta", flat)?;
    let kind = match section.str_opt("rope_type")? {
        Some(kind) => kind,
        None => section.str_opt("type")?.unwrap_or("default"),
    };
    let scaling = match kind {
        "default" => Scaling::Default,
        "linear" => Scaling::Linear {
            factor: section.f64("factor")? as f32,
        },
        "llama3" => Scaling::Llama3 {
            factor: section.f64("factor")? as f32,
            low_freq_factor: section.f64("low_freq_factor")? as f32,
            high_freq_factor: section.f64("high_freq_factor")? as f32,
            original_max_position_embeddings: section.f64("original_max_position_embeddings")?
                as f32,
        },
        other => {
            return Err(Error::unsupported(format!(
                "{}: rope type '{other}' is not supported; default, linear and llama3 are",
                file.path().display()
            )));
        }
    };
    Ok((theta, scaling))
}
