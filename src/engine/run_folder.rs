//! The folder a run writes into: taken by one run at a time, never written over by accident.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{ErrorKind, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::checkpoint;
use crate::error::{Error, Result};

const LOCK: &str = ".lock";
const METRICS: &str = "metrics.jsonl";

/// A run's folder, held until dropped.
#[derive(Debug)]
pub struct RunFolder {
    path: PathBuf,
    lock: File,
    resumes: bool,
}

impl RunFolder {
    /// Takes `path` for a run: a new or empty folder, or with `resume` one that has a checkpoint, or whose run was
    /// killed before its first one (its lock is still there) and begins again.
    ///
    /// # Errors
    /// `Argument` if it is in use, has content, or has nothing to resume; `Io`.
    pub fn open(path: &Path, resume: bool) -> Result<Self> {
        if resume && !path.is_dir() {
            return Err(nothing_to_resume(path));
        }
        std::fs::create_dir_all(path).map_err(Error::io(path))?;
        let killed = path.join(LOCK).exists();
        let mut folder = Self {
            path: path.to_owned(),
            lock: lock(path)?,
            resumes: false,
        };
        if resume {
            checkpoint::recover(path)?;
            folder.resumes = checkpoint::exists(path);
            if !folder.resumes && !killed {
                return Err(nothing_to_resume(path));
            }
        } else {
            refuse_content(path, killed)?;
        }
        Ok(folder)
    }

    /// Whether there is a checkpoint to go on from.
    pub fn resumes(&self) -> bool {
        self.resumes
    }

    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for RunFolder {
    fn drop(&mut self) {
        // Removed while still locked: see `lock`. What cannot be removed is harmless.
        let _ = std::fs::remove_file(self.path.join(LOCK));
        let _ = self.lock.unlock();
    }
}

fn lock(folder: &Path) -> Result<File> {
    let path = folder.join(LOCK);
    loop {
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .read(true)
            .write(true)
            .open(&path)
            .map_err(Error::io(&path))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(Error::argument(format!(
                    "output {} is in use by another run; wait for it or name another folder",
                    folder.display()
                )));
            }
            // A file system without locks.
            Err(TryLockError::Error(error)) if error.kind() == ErrorKind::Unsupported => {}
            Err(TryLockError::Error(error)) => return Err(Error::io(&path)(error)),
        }
        if is_at(&file, &path) {
            return Ok(file);
        }
        // The holder removed the file between our open and our lock: this lock guards nothing.
    }
}

#[cfg(unix)]
fn is_at(file: &File, path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    match (file.metadata(), std::fs::metadata(path)) {
        (Ok(held), Ok(there)) => held.ino() == there.ino() && held.dev() == there.dev(),
        _ => false,
    }
}

#[cfg(not(unix))]
fn is_at(_: &File, path: &Path) -> bool {
    path.exists()
}

fn nothing_to_resume(path: &Path) -> Error {
    Error::argument(format!(
        "output {} has no checkpoint to resume; run without resume to start there, in a new or empty folder",
        path.display()
    ))
}

fn refuse_content(path: &Path, killed: bool) -> Result<()> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(path).map_err(Error::io(path))? {
        let name = entry.map_err(Error::io(path))?.file_name();
        if name != LOCK {
            names.push(name.to_string_lossy().into_owned());
        }
    }
    if names.is_empty() {
        return Ok(());
    }
    names.sort();
    let way_out = if killed || checkpoint::exists(path) {
        "continue its run with resume, or name another folder"
    } else {
        "name another folder, or remove it"
    };
    let more = if names.len() > 5 { ", …" } else { "" };
    names.truncate(5);
    Err(Error::argument(format!(
        "output {} is not empty ({}{more}); {way_out}",
        path.display(),
        names.join(", ")
    )))
}

/// The run's metrics.jsonl: one JSON object a line, in the hands of the system as soon as it is written.
pub(super) struct Metrics {
    path: PathBuf,
    file: File,
}

impl Metrics {
    /// Opens the file for lines after its first `keep` bytes; what comes after them was written
    /// later than the checkpoint that is resumed, and goes.
    pub fn open(folder: &RunFolder, keep: u64) -> Result<Self> {
        let path = folder.path.join(METRICS);
        let mut file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .map_err(Error::io(&path))?;
        let mut cut = || {
            let length = file.metadata()?.len();
            file.set_len(keep.min(length))?;
            file.seek(SeekFrom::End(0))
        };
        cut().map_err(Error::io(&path))?;
        Ok(Self { path, file })
    }

    pub fn write(&mut self, line: &impl Serialize) -> Result<()> {
        let mut text = serde_json::to_string(line)
            .map_err(|error| Error::run(format!("metrics.jsonl: {error}")))?;
        text.push('\n');
        self.file
            .write_all(text.as_bytes())
            .map_err(Error::io(&self.path))
    }

    /// Bytes written so far, all of them on the disk.
    pub fn sync(&mut self) -> Result<u64> {
        self.file
            .sync_data()
            .and_then(|()| self.file.stream_position())
            .map_err(Error::io(&self.path))
    }
}
