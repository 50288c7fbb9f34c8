//! PEFT's adapter folder: adapter_config.json and adapter_model.safetensors, read, written, and matched to a model.

mod config;
mod fields;
mod file;
mod pattern;
mod rules;
mod selector;
mod target;
mod tuned;

pub use config::{AdapterConfig, CONFIG_FILE, PEFT_VERSION};
pub use file::{Adapter, LoraPair, SavedTensor, WEIGHTS_FILE, read, write};
pub use rules::Rules;
pub use selector::Selector;
pub use target::{Modules, Selection, Target, select};
pub use tuned::{
    BottleneckConfig, Common, INFIX, Ia3Config, Ia3Selection, PROMPT_EMBEDDINGS, Tuned,
    TunedConfig, Variant, VirtualConfig, VirtualKind, is_lora, read_tuned, write_tuned,
};
