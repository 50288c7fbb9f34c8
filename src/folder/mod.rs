//! Hugging Face model folders: config.json and safetensors (one file or sharded), read and written.
//!
//! Reading maps the weight files into memory; nothing is copied until a tensor is asked for as `f32`.
//! Writing goes to files aside that are renamed once all of them are complete.

mod config;
mod header;
mod model;
mod staging;
mod weights;
mod write;

pub(crate) use config::kind;
pub use config::{ConfigFile, tokenizer_file};
pub use model::{MAX_SHARD_SIZE, ModelFolder, write_model};
pub use staging::Staging;
pub use weights::{TensorView, Weights};
pub use write::{Tensor, encode, file_dtype, write_safetensors};

/// Metadata that transformers and PEFT put into (and the former asks of) a safetensors file.
pub const PT_METADATA: [(&str, &str); 1] = [("format", "pt")];

/// The files of a folder in a few words, for messages about one that is missing.
pub(crate) fn listing(folder: &std::path::Path) -> String {
    const SHOWN: usize = 12;
    let Ok(entries) = std::fs::read_dir(folder) else {
        return "the folder cannot be read".to_owned();
    };
    let mut names: Vec<String> = entries
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    match names.len() {
        0 => "the folder is empty".to_owned(),
        n if n <= SHOWN => format!("the folder has {}", names.join(", ")),
        n => format!(
            "the folder has {} and {} more",
            names[..SHOWN].join(", "),
            n - SHOWN
        ),
    }
}
