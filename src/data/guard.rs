//! Calls into libraries on content that may be made to break them.

use std::panic::{AssertUnwindSafe, catch_unwind};

/// What a call gives, or the message of its panic. What it leaves half-done must not be used again.
pub fn guarded<R>(call: impl FnOnce() -> R) -> Result<R, String> {
    catch_unwind(AssertUnwindSafe(call)).map_err(|panic| {
        panic
            .downcast_ref::<String>()
            .map(String::as_str)
            .or_else(|| panic.downcast_ref::<&str>().copied())
            .unwrap_or("its content is not consistent")
            .to_owned()
    })
}
