//! Tasks shared between the calling thread and others: rayon's, or the OpenMP team of a library already in the process.

use std::any::Any;
use std::ffi::{c_int, c_uint, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Mutex, OnceLock, PoisonError};

/// `GOMP_parallel` of libgomp's public ABI: runs `start(data)` on each of `threads` threads and waits for all.
pub type GompParallel = extern "C" fn(
    start: extern "C" fn(*mut c_void),
    data: *mut c_void,
    threads: c_uint,
    flags: c_uint,
);
/// `omp_get_max_threads` of OpenMP: the size that the calling thread's next team would have.
pub type MaxThreads = extern "C" fn() -> c_int;

#[derive(Debug, Clone, Copy)]
struct Team {
    parallel: GompParallel,
    max_threads: MaxThreads,
}

static TEAM: OnceLock<Team> = OnceLock::new();

/// From now on [`for_each`] runs its tasks on this OpenMP library's threads, whose number is its own setting.
///
/// Beside PyTorch, threads of rayon's would have to share the cores with PyTorch's OpenMP threads, which go on spinning
/// for more work after each of its operations. Only the first call has an effect.
///
/// # Safety
/// The functions are libgomp's `GOMP_parallel` and OpenMP's `omp_get_max_threads`, of one library that is never unloaded.
pub unsafe fn use_openmp(parallel: GompParallel, max_threads: MaxThreads) {
    let _ = TEAM.set(Team {
        parallel,
        max_threads,
    });
}

/// Threads that [`for_each`] runs on at most.
pub fn threads() -> usize {
    match TEAM.get() {
        Some(team) => usize::try_from((team.max_threads)()).unwrap_or(1),
        None => rayon::current_num_threads(),
    }
}

/// Runs all tasks, each once. The caller's thread is one of those that work and starts at once: dequantising a weight
/// takes a millisecond or two, of which waking threads is a part that counts.
pub fn for_each<I>(tasks: I, run: impl Fn(I::Item) + Sync)
where
    I: Iterator + Send,
{
    let most = tasks.size_hint().0;
    let queue = Mutex::new(tasks);
    let next = || queue.lock().unwrap_or_else(PoisonError::into_inner).next();
    let work = || {
        while let Some(task) = next() {
            run(task);
        }
    };
    let helpers = most.min(threads()).saturating_sub(1);
    match TEAM.get() {
        _ if helpers == 0 => work(),
        Some(team) => on_team(team, helpers + 1, &work),
        None => rayon::in_place_scope(|scope| {
            for _ in 0..helpers {
                scope.spawn(|_| work());
            }
            work();
        }),
    }
}

/// What the threads of a team share: the work, and the first panic of any of them.
struct Shared<'a, F> {
    work: &'a F,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

fn on_team<F: Fn() + Sync>(team: &Team, threads: usize, work: &F) {
    extern "C" fn start<F: Fn() + Sync>(data: *mut c_void) {
        // SAFETY: `data` is the `Shared<F>` below, which outlives the team's run and is shared by `&` alone.
        let shared = unsafe { &*data.cast::<Shared<'_, F>>() };
        // A panic must not cross the C library's frames.
        if let Err(panic) = catch_unwind(AssertUnwindSafe(shared.work)) {
            let mut first = shared.panic.lock().unwrap_or_else(PoisonError::into_inner);
            first.get_or_insert(panic);
        }
    }
    let shared = Shared {
        work,
        panic: Mutex::new(None),
    };
    let threads = c_uint::try_from(threads).unwrap_or(c_uint::MAX);
    (team.parallel)(
        start::<F>,
        std::ptr::from_ref(&shared).cast_mut().cast(),
        threads,
        0,
    );
    let panic = shared
        .panic
        .into_inner()
        .unwrap_or_else(PoisonError::into_inner);
    if let Some(panic) = panic {
        resume_unwind(panic);
    }
}
