//! Launching: the one place that hands a kernel its arguments.

use std::ffi::c_void;

use cudarc::driver::{result, sys};

use super::device::Device;
use super::error::{Result, during};

/// An address in a device's memory; 0 for none.
pub type Address = u64;

/// A raw `CUstream`; 0 is the default stream.
pub type Stream = u64;

/// How many threads run a kernel.
#[derive(Debug, Clone, Copy)]
pub struct Grid {
    pub blocks: (u32, u32, u32),
    /// A block's threads.
    pub threads: u32,
    /// A block's dynamic shared memory, bytes.
    pub shared: u32,
}

impl Grid {
    /// Enough blocks in a row for `items`, `per_block` each.
    pub fn cover(items: u64, per_block: u64, threads: u32) -> Self {
        Self {
            blocks: (items.div_ceil(per_block) as u32, 1, 1),
            threads,
            shared: 0,
        }
    }
}

/// A kernel's one argument, a structure passed by value (`__grid_constant__`).
///
/// # Safety
/// `#[repr(C)]`, with the fields of the kernel's own structure; both sides assert its size.
pub unsafe trait Parameters: Copy {}

impl Device {
    /// Puts a kernel on `stream` and returns; the device's previous current context is restored.
    ///
    /// # Safety
    /// `P` is the structure that kernel `name` takes; its addresses are of this device's memory, hold what the kernel
    /// reads and has room for what it writes, and stay so until the stream has passed the launch.
    pub(super) unsafe fn launch<P: Parameters>(
        &self,
        name: &str,
        grid: Grid,
        stream: Stream,
        parameters: &P,
    ) -> Result<()> {
        let function = self.function(name)?;
        let _context = self.enter()?;
        let mut arguments = [std::ptr::from_ref(parameters).cast_mut().cast::<c_void>()];
        // SAFETY: the driver copies the structure before it returns and does not write to it; the rest is the
        // caller's promise.
        unsafe {
            result::launch_kernel(
                function,
                grid.blocks,
                (grid.threads, 1, 1),
                grid.shared,
                stream as sys::CUstream,
                &mut arguments,
            )
        }
        .map_err(during(name))
    }
}
