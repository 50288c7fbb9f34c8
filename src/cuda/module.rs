//! The embedded fatbins, and the functions in them.

use std::collections::HashMap;
use std::ffi::{CStr, c_char, c_void};

use cudarc::driver::sys::CUfunction_attribute as Attribute;
use cudarc::driver::{DriverError, result, sys};

use super::error::{Result, during};

/// (name of the `.cu` file, its fatbin), written by `kernels/build.rs`.
pub static IMAGES: &[(&str, &[u8])] = include!(concat!(env!("OUT_DIR"), "/images.rs"));

/// Every kernel of a device by its name.
pub(super) type Functions = HashMap<String, sys::CUfunction>;

/// Which of an image's variants the driver chose: compute capabilities times ten, 90 for 9.0.
#[derive(Debug, Clone, Copy, Default)]
pub struct Code {
    /// Of the machine code that runs.
    pub machine: i32,
    /// Of the PTX that it was made from.
    pub source: i32,
}

/// Loads every image that the device has code in, into the current context, and every function onto it. `shared` is the
/// dynamic shared memory that a block may ask for, in bytes.
pub(super) fn load_all(capability: (i32, i32), shared: i32) -> Result<(Functions, Code)> {
    let mut functions = Functions::new();
    let mut code = Code::default();
    for (name, image) in IMAGES {
        if name.ends_with("_sm90a") && capability != (9, 0) {
            continue;
        }
        let what = format!("loading the kernels of {name}.cu");
        // SAFETY: the image is a whole fatbin; the module is never unloaded.
        let module = unsafe { result::module::load_data(image.as_ptr().cast::<c_void>()) }
            .map_err(during(&what))?;
        for function in functions_of(module).map_err(during(&what))? {
            let name = prepare(function, shared).map_err(during(&what))?;
            functions.insert(name, function);
            code = code_of(function).map_err(during(&what))?;
        }
    }
    Ok((functions, code))
}

fn functions_of(module: sys::CUmodule) -> std::result::Result<Vec<sys::CUfunction>, DriverError> {
    let mut count = 0;
    // SAFETY: `module` was just loaded.
    unsafe { sys::cuModuleGetFunctionCount(&raw mut count, module) }.result()?;
    let mut functions = vec![std::ptr::null_mut(); count as usize];
    // SAFETY: `functions` has room for `count` handles.
    unsafe { sys::cuModuleEnumerateFunctions(functions.as_mut_ptr(), count, module) }.result()?;
    Ok(functions)
}

/// Loads a function now, where the driver would do so at its first launch, which a graph's capture forbids; lets it
/// have all the shared memory of a block. Returns its name.
fn prepare(function: sys::CUfunction, shared: i32) -> std::result::Result<String, DriverError> {
    let mut name: *const c_char = std::ptr::null();
    // SAFETY: `function` is a function of a loaded module, here and below.
    unsafe { sys::cuFuncGetName(&raw mut name, function) }.result()?;
    // SAFETY: the driver returned a string that lives as long as the module.
    let name = unsafe { CStr::from_ptr(name) }
        .to_string_lossy()
        .into_owned();
    // SAFETY: as above.
    unsafe { sys::cuFuncLoad(function) }.result()?;
    // SAFETY: as above.
    let fixed = unsafe {
        result::function::get_function_attribute(
            function,
            Attribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES,
        )
    }?;
    // SAFETY: as above.
    unsafe {
        result::function::set_function_attribute(
            function,
            Attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
            shared - fixed,
        )
    }?;
    Ok(name)
}

fn code_of(function: sys::CUfunction) -> std::result::Result<Code, DriverError> {
    let attribute = |attribute| {
        // SAFETY: `function` is a function of a loaded module.
        unsafe { result::function::get_function_attribute(function, attribute) }
    };
    Ok(Code {
        machine: attribute(Attribute::CU_FUNC_ATTRIBUTE_BINARY_VERSION)?,
        source: attribute(Attribute::CU_FUNC_ATTRIBUTE_PTX_VERSION)?,
    })
}
