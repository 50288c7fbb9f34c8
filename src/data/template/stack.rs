//! A stack for templates: what they build may nest as deep as their steps allow, and is printed and dropped level by level.

use std::cell::Cell;
use std::io;

/// Of address space; memory is taken as far as a template's values reach. With [`super::environment::MAX_STEPS`] steps
/// values nest some 300,000 deep, of at most a kilobyte of stack each.
const STACK_BYTES: usize = 512 << 20;

thread_local! {
    static DEEP: Cell<bool> = const { Cell::new(false) };
}

/// Calls `work` on a thread with such a stack: on this one if it has it.
///
/// # Errors
/// That of starting a thread.
pub fn deep<R: Send>(work: impl FnOnce() -> R + Send) -> io::Result<R> {
    if DEEP.get() {
        return Ok(work());
    }
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new()
            .name("chat template".to_owned())
            .stack_size(STACK_BYTES)
            .spawn_scoped(scope, || {
                DEEP.set(true);
                work()
            })?;
        Ok(thread
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    })
}
