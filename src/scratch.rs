//! Reused f32 buffers: large allocations are made once, not once a step.

use std::ops::{Deref, DerefMut};
use std::sync::{Mutex, PoisonError};

static IDLE: Mutex<Vec<Vec<f32>>> = Mutex::new(Vec::new());

/// Buffers kept idle at most; what a step returns beyond that is freed.
const KEPT: usize = 64;

/// An f32 buffer that goes back to the pool when dropped.
pub struct Scratch {
    /// At least `len`: what was once written stays, so that nothing is filled again.
    buffer: Vec<f32>,
    len: usize,
}

impl Scratch {
    /// A buffer of `len` elements with unspecified content.
    pub fn dirty(len: usize) -> Self {
        let mut idle = IDLE.lock().unwrap_or_else(PoisonError::into_inner);
        // The smallest buffer that is large enough, unless it is more than twice too large.
        let fit = idle
            .iter()
            .enumerate()
            .filter(|(_, buffer)| {
                buffer.capacity() >= len && buffer.capacity() / 2 <= len.max(1024)
            })
            .min_by_key(|(_, buffer)| buffer.capacity())
            .map(|(at, _)| at);
        let found = fit.map(|at| idle.swap_remove(at));
        drop(idle);
        let mut buffer = found.unwrap_or_default();
        if buffer.len() < len {
            buffer.resize(len, 0.0);
        }
        Self { buffer, len }
    }

    /// A buffer of `len` zeros.
    pub fn zeros(len: usize) -> Self {
        let mut buffer = Self::dirty(len);
        buffer.fill(0.0);
        buffer
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let mut idle = IDLE.lock().unwrap_or_else(PoisonError::into_inner);
        if idle.len() < KEPT {
            idle.push(std::mem::take(&mut self.buffer));
        }
    }
}

impl Deref for Scratch {
    type Target = [f32];
    fn deref(&self) -> &[f32] {
        &self.buffer[..self.len]
    }
}

impl DerefMut for Scratch {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut self.buffer[..self.len]
    }
}

/// Frees every idle buffer.
pub fn release() {
    IDLE.lock().unwrap_or_else(PoisonError::into_inner).clear();
}
