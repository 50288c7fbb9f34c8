//! Hugging Face model folders: safetensors in one file or sharded, read and written.
