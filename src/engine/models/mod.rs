//! Models of the engine: what each family's config.json and names say, and the one transformer that
//! all of them are built as.

mod architecture;
mod bert;
mod gpt2;
mod labels;
mod llama;
mod names;
pub mod transformer;

pub use architecture::{Architecture, Head, Task};
pub use labels::Labels;
pub use names::{Family, Names};
pub use transformer::{
    Beside, Decoder, Init, LoadPlan, Lora, Quantize, Trained, Transformer, linear_modules,
    other_modules, split_prefix,
};
