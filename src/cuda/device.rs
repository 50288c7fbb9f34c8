//! A device and its loaded kernels, kept for the life of the process.

use std::sync::{Mutex, OnceLock, PoisonError};

use cudarc::driver::sys::CUdevice_attribute as Attribute;
use cudarc::driver::{result, sys};

use super::driver::{check_process, initialise};
use super::error::{CudaError, Result, during};
use super::module::{Code, Functions, load_all};

/// Devices that can be prepared: more than any machine has.
const MAX_DEVICES: usize = 64;

static PREPARED: [OnceLock<Device>; MAX_DEVICES] = [const { OnceLock::new() }; MAX_DEVICES];
static PREPARING: Mutex<()> = Mutex::new(());

/// A device whose kernels are loaded.
#[derive(Debug)]
pub struct Device {
    pub ordinal: usize,
    pub name: String,
    /// Compute capability, (9, 0) for an H100.
    pub capability: (i32, i32),
    /// Streaming multiprocessors.
    pub multiprocessors: u32,
    /// Shared memory that a block may ask for, bytes.
    pub shared: u32,
    pub code: Code,
    context: sys::CUcontext,
    functions: Functions,
}

// SAFETY: contexts and functions are handles that CUDA lets every thread use.
unsafe impl Send for Device {}
// SAFETY: as above; nothing is changed after construction.
unsafe impl Sync for Device {}

impl Device {
    /// Retains the device's primary context and loads every kernel, once; later calls return at once.
    ///
    /// # Errors
    /// No driver or device, a driver that is too old, a device that no kernel was built for, a forked process.
    pub fn prepare(ordinal: usize) -> Result<&'static Self> {
        check_process()?;
        let slot = Self::slot(ordinal)?;
        if let Some(device) = slot.get() {
            return Ok(device);
        }
        let _one_at_a_time = PREPARING.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(device) = slot.get() {
            return Ok(device);
        }
        let device = Self::open(ordinal)?;
        Ok(slot.get_or_init(|| device))
    }

    /// A device that [`Device::prepare`] was called for.
    ///
    /// # Errors
    /// It was not, or the process was forked since.
    pub fn get(ordinal: usize) -> Result<&'static Self> {
        check_process()?;
        Self::slot(ordinal)?.get().ok_or_else(|| {
            CudaError::new(
                sys::CUresult::CUDA_ERROR_NOT_INITIALIZED,
                format!("device {ordinal} was not prepared: call ferrotune.ops.cuda.prepare first"),
            )
        })
    }

    fn slot(ordinal: usize) -> Result<&'static OnceLock<Self>> {
        PREPARED.get(ordinal).ok_or_else(|| {
            CudaError::new(
                sys::CUresult::CUDA_ERROR_INVALID_DEVICE,
                format!("there is no device {ordinal}"),
            )
        })
    }

    fn open(ordinal: usize) -> Result<Self> {
        initialise()?;
        let what = format!("opening device {ordinal}");
        let device = result::device::get(ordinal as i32).map_err(during(&what))?;
        let attribute = |attribute| {
            // SAFETY: `device` is a valid handle, as the call above succeeded.
            unsafe { result::device::get_attribute(device, attribute) }.map_err(during(&what))
        };
        let name = result::device::get_name(device).map_err(during(&what))?;
        let capability = (
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        );
        if capability < (8, 0) {
            return Err(CudaError::new(
                sys::CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU,
                format!(
                    "{name} has compute capability {}.{}, but the kernels need 8.0 or newer",
                    capability.0, capability.1
                ),
            ));
        }
        let multiprocessors =
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as u32;
        let shared = attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?;
        // SAFETY: as above. The context is never released: it lives as long as the process.
        let context = unsafe { result::primary_ctx::retain(device) }.map_err(during(&what))?;
        let guard = ContextGuard::enter(context, ordinal)?;
        let (functions, code) = load_all(capability, shared)?;
        drop(guard);
        Ok(Self {
            ordinal,
            name,
            capability,
            multiprocessors,
            shared: shared as u32,
            code,
            context,
            functions,
        })
    }

    /// Makes this device's context current until the guard is dropped.
    pub(super) fn enter(&self) -> Result<ContextGuard> {
        ContextGuard::enter(self.context, self.ordinal)
    }

    pub(super) fn function(&self, name: &str) -> Result<sys::CUfunction> {
        self.functions.get(name).copied().ok_or_else(|| {
            CudaError::new(
                sys::CUresult::CUDA_ERROR_NOT_FOUND,
                format!("no kernel is called '{name}'"),
            )
        })
    }

    /// Names of the kernels, sorted.
    pub fn kernels(&self) -> Vec<&str> {
        let mut names: Vec<_> = self.functions.keys().map(String::as_str).collect();
        names.sort_unstable();
        names
    }
}

/// Restores the thread's current context when dropped, so that PyTorch's current device stays what it was: a thread
/// without one keeps device 0's, which is its device already, and is left without one by the others.
#[derive(Debug)]
pub(super) struct ContextGuard {
    pushed: bool,
}

impl ContextGuard {
    fn enter(context: sys::CUcontext, ordinal: usize) -> Result<Self> {
        let current =
            result::ctx::get_current().map_err(during("asking for the current context"))?;
        if current == Some(context) {
            return Ok(Self { pushed: false });
        }
        if current.is_none() && ordinal == 0 {
            // A new thread's device is 0 already, and cuBLAS asks for a context in it.
            // SAFETY: `context` is a retained primary context.
            unsafe { result::ctx::set_current(context) }.map_err(during("entering a context"))?;
            return Ok(Self { pushed: false });
        }
        // SAFETY: `context` is a retained primary context.
        unsafe { sys::cuCtxPushCurrent_v2(context) }
            .result()
            .map_err(during("entering a context"))?;
        Ok(Self { pushed: true })
    }
}

impl Drop for ContextGuard {
    fn drop(&mut self) {
        if self.pushed {
            let mut left = std::ptr::null_mut();
            // SAFETY: takes off what `enter` pushed; a failure leaves nothing to be undone.
            let _ = unsafe { sys::cuCtxPopCurrent_v2(&raw mut left) };
        }
    }
}
