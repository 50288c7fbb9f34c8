//! Which threads native operations run on.

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::parallel;

/// Runs native operations on the threads of a libgomp that the process has loaded for good, from the addresses of its
/// functions `GOMP_parallel` and `omp_get_max_threads`. `ferrotune.threads` finds them.
#[pyfunction]
pub fn use_openmp(gomp_parallel: usize, omp_get_max_threads: usize) -> PyResult<()> {
    if gomp_parallel == 0 || omp_get_max_threads == 0 {
        return Err(PyValueError::new_err("an address of a function is not 0"));
    }
    // SAFETY: `ferrotune.threads` resolved both names in one mapped libgomp, which ctypes never unloads; a function
    // pointer is not null, as checked.
    unsafe {
        parallel::use_openmp(
            std::mem::transmute::<usize, parallel::GompParallel>(gomp_parallel),
            std::mem::transmute::<usize, parallel::MaxThreads>(omp_get_max_threads),
        );
    }
    Ok(())
}
