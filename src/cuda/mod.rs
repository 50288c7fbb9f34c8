//! Native CUDA: the kernels of `kernels/`, launched on the caller's stream.
//!
//! The caller owns memory and streams: operations take device addresses and a raw stream, allocate nothing, wait for
//! nothing and load nothing, so CUDA graphs capture them. [`Device::prepare`] does all that once per device, in the
//! primary context, which PyTorch uses too. Nothing here runs before the first call: without a driver the rest of the
//! crate works, and a call raises one clear error.

pub mod cross_entropy;
mod device;
mod driver;
pub mod dropout;
mod error;
pub mod glu;
mod launch;
pub mod lora;
mod module;
pub mod quant;
pub mod rms_norm;
pub mod rope;

pub use device::Device;
pub use driver::{DRIVER_NEEDED, device_count, driver_version};
pub use error::CudaError;
pub use launch::{Address, Grid, Parameters, Stream};
pub use module::{Code, IMAGES};
