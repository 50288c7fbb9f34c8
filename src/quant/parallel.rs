//! Work shared between the calling thread and rayon's.

use std::sync::{Mutex, PoisonError};

/// Runs all tasks, each once, on as many threads as rayon has. The caller's is one of them and starts at once:
/// dequantising a weight takes a millisecond or two, of which waking threads is a part that counts.
pub(super) fn for_each<I>(tasks: I, run: impl Fn(I::Item) + Sync)
where
    I: Iterator + Send,
{
    let helpers = tasks
        .size_hint()
        .0
        .min(rayon::current_num_threads())
        .saturating_sub(1);
    let queue = Mutex::new(tasks);
    let next = || queue.lock().unwrap_or_else(PoisonError::into_inner).next();
    let work = || {
        while let Some(task) = next() {
            run(task);
        }
    };
    if helpers == 0 {
        return work();
    }
    rayon::in_place_scope(|scope| {
        for _ in 0..helpers {
            scope.spawn(|_| work());
        }
        work();
    });
}
