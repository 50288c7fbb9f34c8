//! A run's resumable state on disk, replaced as a whole or not at all.
//!
//! `checkpoint/` holds state.json, weights.safetensors and optimizer.safetensors, and
//! best.safetensors where the best weights are older. A new one is written to
//! `checkpoint.tmp-<pid>` and synced; then `checkpoint` becomes `checkpoint.old`, the new one
//! becomes `checkpoint`, and the old one goes. [`recover`] mends what a crash between these leaves.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use safetensors::tensor::{Dtype, SafeTensors};

use super::state::State;
use super::{Moments, Parameter};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::folder::{Tensor, write_safetensors};

const NAME: &str = "checkpoint";
const OLD: &str = "checkpoint.old";
const TEMPORARY: &str = "checkpoint.tmp-";
const STATE: &str = "state.json";
const WEIGHTS: &str = "weights.safetensors";
const OPTIMIZER: &str = "optimizer.safetensors";
const BEST: &str = "best.safetensors";

/// What a checkpoint is made of. Slices have the parameters' order and lengths.
pub struct Contents<'a> {
    pub state: &'a State,
    pub parameters: &'a [Parameter],
    pub weights: &'a [Vec<f32>],
    pub moments: &'a [Moments],
    /// None where the best weights are the current ones.
    pub best: Option<&'a [Vec<f32>]>,
}

/// A checkpoint read back.
pub struct Loaded {
    pub state: State,
    pub weights: Vec<Vec<f32>>,
    pub moments: Vec<Moments>,
    pub best: Option<Vec<Vec<f32>>>,
}

/// Where the run's checkpoint lies.
pub fn path(run: &Path) -> PathBuf {
    run.join(NAME)
}

/// Whether there is one, a crash's leftovers included.
pub fn exists(run: &Path) -> bool {
    [NAME, OLD]
        .iter()
        .any(|name| run.join(name).join(STATE).is_file())
}

/// Replaces the run's checkpoint. On an error the older one is untouched.
pub fn write(run: &Path, contents: &Contents) -> Result<()> {
    let aside = run.join(format!("{TEMPORARY}{}", std::process::id()));
    let written = fill(&aside, contents).and_then(|()| exchange(run, &aside));
    if written.is_err() {
        let _ = fs::remove_dir_all(&aside);
    }
    written
}

fn fill(folder: &Path, contents: &Contents) -> Result<()> {
    fs::create_dir(folder).map_err(Error::io(folder))?;
    let step = contents.state.step;
    let parameters = contents.parameters;
    save(
        &folder.join(WEIGHTS),
        step,
        named(parameters, contents.weights),
    )?;
    let mut averages = Vec::with_capacity(2 * parameters.len());
    for (parameter, moments) in parameters.iter().zip(contents.moments) {
        let name = &parameter.name;
        averages.push((exp_avg(name), moments.exp_avg.as_slice()));
        averages.push((exp_avg_sq(name), moments.exp_avg_sq.as_slice()));
    }
    save(&folder.join(OPTIMIZER), step, averages)?;
    if let Some(best) = contents.best {
        save(&folder.join(BEST), step, named(parameters, best))?;
    }
    let text = serde_json::to_string_pretty(contents.state)
        .map_err(|error| Error::run(format!("{STATE}: {error}")))?;
    let path = folder.join(STATE);
    fs::write(&path, text).map_err(Error::io(&path))?;
    sync(&path)?;
    sync(folder)
}

fn exchange(run: &Path, aside: &Path) -> Result<()> {
    let (current, old) = (run.join(NAME), run.join(OLD));
    if current.exists() {
        remove(&old)?;
        fs::rename(&current, &old).map_err(Error::io(&current))?;
    }
    if let Err(error) = fs::rename(aside, &current) {
        // The older one goes back where readers look for it; `recover` would do the same.
        let _ = fs::rename(&old, &current);
        return Err(Error::io(&current)(error));
    }
    sync(run)?;
    remove(&old)
}

/// Puts things right after a crash: the newest whole checkpoint at its place, nothing else.
pub fn recover(run: &Path) -> Result<()> {
    let (current, old) = (run.join(NAME), run.join(OLD));
    if old.exists() && !current.exists() {
        fs::rename(&old, &current).map_err(Error::io(&old))?;
    }
    remove(&old)?;
    for entry in fs::read_dir(run).map_err(Error::io(run))? {
        let entry = entry.map_err(Error::io(run))?;
        if entry.file_name().to_string_lossy().starts_with(TEMPORARY) {
            remove(&entry.path())?;
        }
    }
    Ok(())
}

/// Reads the state alone: to see whether the rest fits before it is read.
///
/// # Errors
/// `Format` naming the file and what is wrong with it; `Io`.
pub fn load_state(run: &Path) -> Result<State> {
    let path = path(run).join(STATE);
    let text = fs::read_to_string(&path).map_err(Error::io(&path))?;
    State::from_json(&text).map_err(|message| Error::format(&path, message))
}

/// Reads the rest, for a `state` whose layout is that of `parameters`.
///
/// # Errors
/// `Format` naming the file and what is wrong with it; `Io`.
pub fn load(run: &Path, state: State, parameters: &[Parameter]) -> Result<Loaded> {
    let folder = path(run);
    let names: Vec<&str> = parameters.iter().map(|p| p.name.as_str()).collect();
    let lengths: Vec<usize> = parameters.iter().map(|p| p.var.elem_count()).collect();
    let read = |file: &str, rename: &dyn Fn(&str) -> String| {
        let expected = names.iter().zip(&lengths);
        read_file(
            &folder.join(file),
            state.step,
            expected.map(|(name, &length)| (rename(name), length)),
        )
    };
    let plain = |name: &str| name.to_owned();
    let weights = read(WEIGHTS, &plain)?;
    let averages = read(OPTIMIZER, &exp_avg)?;
    let squares = read(OPTIMIZER, &exp_avg_sq)?;
    let older = state.best.is_some_and(|best| best.step != state.step);
    let best = older.then(|| read(BEST, &plain)).transpose()?;
    let moments = averages.into_iter().zip(squares);
    Ok(Loaded {
        weights,
        moments: moments
            .map(|(exp_avg, exp_avg_sq)| Moments {
                exp_avg,
                exp_avg_sq,
            })
            .collect(),
        best,
        state,
    })
}

fn exp_avg(name: &str) -> String {
    format!("{name}.exp_avg")
}

fn exp_avg_sq(name: &str) -> String {
    format!("{name}.exp_avg_sq")
}

fn named<'a>(parameters: &[Parameter], values: &'a [Vec<f32>]) -> Vec<(String, &'a [f32])> {
    let names = parameters.iter().map(|parameter| parameter.name.clone());
    names.zip(values.iter().map(Vec::as_slice)).collect()
}

fn save(path: &Path, step: usize, tensors: Vec<(String, &[f32])>) -> Result<()> {
    let tensors = tensors
        .into_iter()
        .map(|(name, values)| Tensor::from_f32(name, DType::F32, &[values.len()], values))
        .collect();
    write_safetensors(path, tensors, &[("step", &step.to_string())])
}

fn read_file(
    path: &Path,
    step: usize,
    expected: impl Iterator<Item = (String, usize)>,
) -> Result<Vec<Vec<f32>>> {
    let refuse = |message: String| Error::format(path, message);
    let bytes = fs::read(path).map_err(Error::io(path))?;
    let broken = |error: safetensors::SafeTensorError| refuse(error.to_string());
    let (_, metadata) = SafeTensors::read_metadata(&bytes).map_err(broken)?;
    let written = metadata
        .metadata()
        .as_ref()
        .and_then(|entries| entries.get("step"));
    if written != Some(&step.to_string()) {
        return Err(refuse(format!(
            "written after step {}, the checkpoint's state after step {step}",
            written.map_or("?", String::as_str)
        )));
    }
    let tensors = SafeTensors::deserialize(&bytes).map_err(broken)?;
    expected
        .map(|(name, length)| {
            let tensor = tensors.tensor(&name).map_err(broken)?;
            if tensor.dtype() != Dtype::F32 || tensor.shape() != [length] {
                return Err(refuse(format!(
                    "tensor {name} is {:?} {:?}, not F32 [{length}]",
                    tensor.dtype(),
                    tensor.shape()
                )));
            }
            let (values, _) = tensor.data().as_chunks();
            Ok(values
                .iter()
                .map(|&bytes| f32::from_le_bytes(bytes))
                .collect())
        })
        .collect()
}

/// Waits until what was written to a file or a folder is on the disk.
fn sync(path: &Path) -> Result<()> {
    File::open(path)
        .and_then(|file| file.sync_all())
        .map_err(Error::io(path))
}

fn remove(folder: &Path) -> Result<()> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(Error::io(folder)(error)),
        _ => Ok(()),
    }
}
