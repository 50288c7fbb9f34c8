//! Jobs on a thread of their own, while the caller's thread answers them and looks for signals.
//!
//! Python handles signals in its main thread only, and a notebook shows what is printed by the
//! thread that runs the cell: so callbacks are called on the thread that started the job, whatever
//! threads the job itself works on.

use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use pyo3::prelude::*;

use crate::engine::{Control, Event, Hooks};
use crate::error::{Error, Result};

/// Time between two looks for signals.
const POLL: Duration = Duration::from_millis(50);
/// As much as a main thread usually has, in bytes.
const STACK: usize = 8 << 20;

/// What a signal's handler raised, until the job takes it.
type Raised = Arc<Mutex<Option<Error>>>;

/// A text for the callback, and where its answer goes.
struct Question {
    text: String,
    answer: Sender<Result<bool>>,
}

/// A job's way to the thread that started it.
pub struct Caller {
    questions: Sender<Question>,
    raised: Raised,
}

impl Caller {
    /// The callback's answer to `text`: whether to go on.
    ///
    /// # Errors
    /// What the callback raised; `Interrupted` for Ctrl-C.
    pub fn ask(&self, text: String) -> Result<bool> {
        let gone = || Error::run("the thread that started the job is gone");
        let (answer, answered) = channel();
        self.questions
            .send(Question { text, answer })
            .map_err(|_| gone())?;
        answered.recv().map_err(|_| gone())?
    }

    /// # Errors
    /// What a signal's handler raised since the last call; `Interrupted` for Ctrl-C.
    pub fn poll(&self) -> Result<()> {
        let mut raised = self.raised.lock().unwrap_or_else(PoisonError::into_inner);
        raised.take().map_or(Ok(()), Err)
    }
}

impl Hooks for Caller {
    fn on_event(&mut self, event: &Event) -> Result<Control> {
        let go_on = self.ask(super::engine::to_json(event)?)?;
        Ok(if go_on {
            Control::Continue
        } else {
            Control::Stop
        })
    }

    fn poll(&mut self) -> Result<Control> {
        Self::poll(self).map(|()| Control::Continue)
    }
}

/// Runs `job`; `callback` is called on this thread, and without one every answer is to go on.
pub fn run<R: Send>(
    py: Python<'_>,
    callback: Option<&Py<PyAny>>,
    job: impl FnOnce(Caller) -> Result<R> + Send,
) -> Result<R> {
    let (questions, asked) = channel();
    let raised = Raised::default();
    let caller = Caller {
        questions,
        raised: Arc::clone(&raised),
    };
    py.detach(move || {
        std::thread::scope(|scope| {
            let worker = std::thread::Builder::new()
                .stack_size(STACK)
                .spawn_scoped(scope, || job(caller))
                .map_err(|error| Error::run(format!("cannot start a thread: {error}")))?;
            answer(&asked, callback, &raised);
            worker
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    })
}

/// Answers until the job ends.
fn answer(asked: &Receiver<Question>, callback: Option<&Py<PyAny>>, raised: &Raised) {
    loop {
        match asked.recv_timeout(POLL) {
            Ok(question) => {
                let answer = Python::attach(|py| call(py, callback, &question.text));
                // A job that no longer waits has ended.
                let _ = question.answer.send(answer);
            }
            Err(RecvTimeoutError::Timeout) => {
                if let Err(error) = Python::attach(|py| py.check_signals().map_err(of_python(py))) {
                    *raised.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
                }
            }
            Err(RecvTimeoutError::Disconnected) => return,
        }
    }
}

fn call(py: Python<'_>, callback: Option<&Py<PyAny>>, text: &str) -> Result<bool> {
    let go_on = match callback {
        None => Ok(true),
        Some(callback) => callback
            .call1(py, (text,))
            .and_then(|answer| answer.is_truthy(py)),
    };
    let go_on = go_on.map_err(of_python(py))?;
    py.check_signals().map_err(of_python(py))?;
    Ok(go_on)
}

/// A Python exception: Ctrl-C stops a job in order, anything else at once.
fn of_python(py: Python<'_>) -> impl Fn(PyErr) -> Error + '_ {
    move |error| {
        if error.is_instance_of::<pyo3::exceptions::PyKeyboardInterrupt>(py) {
            Error::Interrupted
        } else {
            Error::Python(error)
        }
    }
}
