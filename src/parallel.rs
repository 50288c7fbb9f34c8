//! Tasks shared between the calling thread and others: rayon's, or the OpenMP team of a library already in the process.

use std::any::Any;
use std::ffi::{c_int, c_uint, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
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
    on_threads(most, &work);
}

/// Tasks by their numbers from 0 on.
pub struct Round<'a> {
    pub tasks: usize,
    pub run: Box<dyn Fn(usize) + Sync + 'a>,
}

/// Runs all tasks of each round, and then those of the next one, on one set of threads: to wake them for every round
/// would take longer than a short one does. They wait for a round's end awake.
pub fn in_turn(rounds: &[Round<'_>]) {
    let counts = || (AtomicUsize::new(0), AtomicUsize::new(0)); // begun, ended
    let counts: Vec<_> = rounds.iter().map(|_| counts()).collect();
    let failed = AtomicBool::new(false);
    let panic = Mutex::new(None);
    let work = || {
        for (round, (begun, ended)) in rounds.iter().zip(&counts) {
            loop {
                let task = begun.fetch_add(1, Ordering::Relaxed);
                if task >= round.tasks {
                    break;
                }
                // A task that does not end would have the others wait for good.
                if !failed.load(Ordering::Relaxed)
                    && let Err(found) = catch_unwind(AssertUnwindSafe(|| (round.run)(task)))
                {
                    failed.store(true, Ordering::Relaxed);
                    let mut first = panic.lock().unwrap_or_else(PoisonError::into_inner);
                    first.get_or_insert(found);
                }
                ended.fetch_add(1, Ordering::Release);
            }
            let mut waited = 0_u32;
            while ended.load(Ordering::Acquire) < round.tasks {
                waited += 1;
                if waited.is_multiple_of(1 << 12) {
                    std::thread::yield_now();
                }
                std::hint::spin_loop();
            }
        }
    };
    on_threads(
        rounds.iter().map(|round| round.tasks).max().unwrap_or(0),
        &work,
    );
    let panic = panic.into_inner().unwrap_or_else(PoisonError::into_inner);
    if let Some(panic) = panic {
        resume_unwind(panic);
    }
}

/// Runs `work` on this thread and others, no more than `most` in all.
fn on_threads(most: usize, work: &(impl Fn() + Sync)) {
    let helpers = most.min(threads()).saturating_sub(1);
    match TEAM.get() {
        _ if helpers == 0 => work(),
        Some(team) => on_team(team, helpers + 1, work),
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

#[cfg(test)]
mod tests {
    use super::*;

    fn round<'a>(tasks: usize, run: impl Fn(usize) + Sync + 'a) -> Round<'a> {
        let run = Box::new(run);
        Round { tasks, run }
    }

    #[test]
    fn rounds_come_one_after_the_other() {
        let seen = Mutex::new(Vec::new());
        let note = |number: usize| {
            let seen = &seen;
            move |task: usize| seen.lock().unwrap().push((number, task))
        };
        in_turn(&[
            round(0, note(0)),
            round(100, note(1)),
            round(1, note(2)),
            round(64, note(3)),
        ]);
        let mut seen = seen.into_inner().unwrap();
        assert!(seen.is_sorted_by_key(|(number, _)| *number));
        seen.sort_unstable();
        let expected = (0..100).map(|task| (1, task)).chain([(2, 0)]);
        let expected: Vec<_> = expected.chain((0..64).map(|task| (3, task))).collect();
        assert_eq!(seen, expected);
        in_turn(&[]);
    }

    #[test]
    fn a_panic_ends_all_rounds_and_comes_through() {
        let later = AtomicUsize::new(0);
        let found = catch_unwind(AssertUnwindSafe(|| {
            in_turn(&[
                round(50, |task| assert_ne!(task, 7, "the seventh")),
                round(50, |_| {
                    later.fetch_add(1, Ordering::Relaxed);
                }),
            ]);
        }));
        let message = *found.unwrap_err().downcast::<String>().unwrap();
        assert!(message.contains("the seventh"), "{message}");
        assert_eq!(later.into_inner(), 0);
    }
}
