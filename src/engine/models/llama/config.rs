//! What a Llama's config.json says.

use std::path::Path;

use crate::engine::ops::rope::Scaling;
use crate::error::{Error, Result};
use crate::folder::ConfigFile;

/// The architecture this room builds, as config.json names it.
pub const ARCHITECTURE: &str = "LlamaForCausalLM";

/// Sizes and constants of a Llama.
#[derive(Debug, Clone, PartialEq)]
pub struct LlamaConfig {
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    pub num_key_value_heads: usize,
    pub head_dim: usize,
    pub vocab_size: usize,
    pub max_position_embeddings: usize,
    pub rms_norm_eps: f32,
    pub rope_theta: f64,
    pub rope_scaling: Scaling,
    pub tie_word_embeddings: bool,
    pub attention_bias: bool,
    pub mlp_bias: bool,
    pub bos_token_id: Option<u32>,
    pub eos_token_ids: Vec<u32>,
}

impl LlamaConfig {
    /// Reads `folder`'s config.json; the defaults of absent fields are transformers'.
    pub fn read(folder: &Path) -> Result<Self> {
        let file = ConfigFile::open(folder)?;
        let architecture = file.architecture()?;
        if architecture != ARCHITECTURE {
            return Err(Error::unsupported(format!(
                "{}: the architecture {architecture} is not supported; the engine runs {ARCHITECTURE}",
                file.path().display()
            )));
        }
        let hidden_size = file.usize("hidden_size")?;
        let num_attention_heads = file.usize("num_attention_heads")?;
        let num_key_value_heads = file.usize_or("num_key_value_heads", num_attention_heads)?;
        let head_dim = match file.usize_opt("head_dim")? {
            Some(size) => size,
            None => hidden_size / num_attention_heads.max(1),
        };
        let (rope_theta, rope_scaling) = rope(&file)?;
        let activation = file.str_opt("hidden_act")?.unwrap_or("silu");
        if activation != "silu" {
            return Err(file.wrong("hidden_act", "\"silu\""));
        }
        let config = Self {
            hidden_size,
            intermediate_size: file.usize("intermediate_size")?,
            num_hidden_layers: file.usize("num_hidden_layers")?,
            num_attention_heads,
            num_key_value_heads,
            head_dim,
            vocab_size: file.usize("vocab_size")?,
            max_position_embeddings: file.usize_or("max_position_embeddings", 2048)?,
            rms_norm_eps: file.f64_or("rms_norm_eps", 1e-6)? as f32,
            rope_theta,
            rope_scaling,
            tie_word_embeddings: file.bool_or("tie_word_embeddings", false)?,
            attention_bias: file.bool_or("attention_bias", false)?,
            mlp_bias: file.bool_or("mlp_bias", false)?,
            bos_token_id: file.token_ids("bos_token_id")?.first().copied(),
            eos_token_ids: file.token_ids("eos_token_id")?,
        };
        config.check(&file)?;
        Ok(config)
    }

    fn check(&self, file: &ConfigFile) -> Result<()> {
        for (key, value) in [
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("num_hidden_layers", self.num_hidden_layers),
            ("num_attention_heads", self.num_attention_heads),
            ("num_key_value_heads", self.num_key_value_heads),
            ("vocab_size", self.vocab_size),
            ("max_position_embeddings", self.max_position_embeddings),
        ] {
            if value == 0 {
                return Err(file.wrong(key, "a positive whole number"));
            }
        }
        if self.head_dim == 0 || self.head_dim % 2 == 1 {
            return Err(file.wrong("head_dim", "an even positive number"));
        }
        if !self
            .num_attention_heads
            .is_multiple_of(self.num_key_value_heads)
        {
            return Err(file.wrong("num_key_value_heads", "a divisor of num_attention_heads"));
        }
        Ok(())
    }
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
