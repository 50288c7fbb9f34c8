//! Launching: the one place that hands a kernel its arguments.

use std::ffi::c_void;

use cudarc::driver::sys;

use super::device::Device;
use super::error::{Result, during};

/// An address in a device's memory; 0 for none.
pub type Address = u64;

/// A raw `CUstream`; 0 is the default stream.
pub type Stream = u64;

/// Whether addresses, and distances in bytes, are multiples of the 16 bytes that kernels load at once.
pub(super) fn aligned(bytes: &[u64]) -> bool {
    bytes.iter().all(|bytes| bytes % 16 == 0)
}

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

    /// As the driver takes it; it holds the address of the attributes.
    fn config(
        self,
        stream: Stream,
        attributes: &mut [sys::CUlaunchAttribute],
    ) -> sys::CUlaunchConfig {
        sys::CUlaunchConfig {
            gridDimX: self.blocks.0,
            gridDimY: self.blocks.1,
            gridDimZ: self.blocks.2,
            blockDimX: self.threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: self.shared,
            hStream: stream as sys::CUstream,
            attrs: attributes.as_mut_ptr(),
            numAttrs: attributes.len() as u32,
        }
    }
}

/// A kernel's one argument, a structure passed by value (`__grid_constant__`).
///
/// # Safety
/// `#[repr(C)]`, with the fields of the kernel's own structure; both sides assert its size.
pub unsafe trait Parameters: Copy {}

impl Device {
    /// Puts a kernel on `stream` and returns; the device's previous current context is restored. The kernel's blocks may
    /// start before the previous one's end (`kernels/common/launch.cuh`).
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
        // SAFETY: the caller's promise.
        unsafe { self.launch_clusters(name, grid, 1, stream, parameters) }
    }

    /// [`Device::launch`] of blocks of which each `cluster` in a row run together, which takes compute capability 9.0
    /// for more than one; theirs is a multiple of it, and the kernel has no size of its own.
    ///
    /// # Safety
    /// As there.
    pub(super) unsafe fn launch_clusters<P: Parameters>(
        &self,
        name: &str,
        grid: Grid,
        cluster: u32,
        stream: Stream,
        parameters: &P,
    ) -> Result<()> {
        let function = self.function(name)?;
        let _context = self.enter()?;
        let mut arguments = [std::ptr::from_ref(parameters).cast_mut().cast::<c_void>()];
        let early = sys::CUlaunchAttribute {
            id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: sys::CUlaunchAttributeValue {
                programmaticStreamSerializationAllowed: 1,
            },
        };
        let mut attributes = [early, together(cluster)];
        let count = usize::from(self.capability >= (9, 0)) + usize::from(cluster > 1);
        let config = grid.config(stream, &mut attributes[..count]);
        // SAFETY: the driver copies the structures before it returns and does not write to them; the rest is the
        // caller's promise.
        unsafe {
            sys::cuLaunchKernelEx(
                &raw const config,
                function,
                arguments.as_mut_ptr(),
                std::ptr::null_mut(),
            )
        }
        .result()
        .map_err(during(name))
    }

    /// How many clusters of so many blocks of kernel `name` the device has room for at a time.
    ///
    /// # Errors
    /// The driver's.
    pub(super) fn clusters(&self, name: &str, grid: Grid, cluster: u32) -> Result<u32> {
        let function = self.function(name)?;
        let _context = self.enter()?;
        let mut attributes = [together(cluster)];
        let config = grid.config(0, &mut attributes);
        let mut found = 0;
        // SAFETY: the driver reads the structures and writes the number.
        unsafe { sys::cuOccupancyMaxActiveClusters(&raw mut found, function, &raw const config) }
            .result()
            .map_err(during(name))?;
        Ok(u32::try_from(found).unwrap_or(0))
    }
}

/// Each `cluster` blocks in a row run together.
fn together(cluster: u32) -> sys::CUlaunchAttribute {
    sys::CUlaunchAttribute {
        id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION,
        pad: [0; 4],
        value: sys::CUlaunchAttributeValue {
            clusterDim: sys::CUlaunchAttributeValue_union__bindgen_ty_1 {
                x: cluster,
                y: 1,
                z: 1,
            },
        },
    }
}
