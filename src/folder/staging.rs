//! Several files of one folder that appear together: written aside, renamed once all of them are complete.

use std::ffi::OsString;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use super::write::{Failure, Tensor, stream};
use crate::error::{Error, Result};

/// Files being written for a folder. Dropped without `commit`, it leaves the folder as it was.
///
/// They lie in a hidden subfolder, on the same file system, so that `commit` only renames: a disk that fills does so
/// while the old files are still whole.
pub struct Staging {
    folder: PathBuf,
    aside: TempDir,
    names: Vec<OsString>,
}

impl Staging {
    /// Makes the folder if it is not there.
    pub fn new(folder: &Path) -> Result<Self> {
        std::fs::create_dir_all(folder).map_err(Error::io(folder))?;
        let aside = tempfile::Builder::new()
            .prefix(".ferrotune-")
            .tempdir_in(folder)
            .map_err(Error::io(folder))?;
        Ok(Self {
            folder: folder.to_owned(),
            aside,
            names: Vec::new(),
        })
    }

    fn fill<E: From<std::io::Error>>(
        &mut self,
        name: &str,
        fill: impl FnOnce(&mut BufWriter<&File>) -> std::result::Result<(), E>,
    ) -> std::result::Result<(), E> {
        let file = File::create(self.aside.path().join(name))?;
        let mut writer = BufWriter::new(&file);
        fill(&mut writer)?;
        writer.flush()?;
        drop(writer);
        file.sync_all()?;
        self.names.push(name.into());
        Ok(())
    }

    /// Writes one file, named as it will be in the folder.
    pub fn write(&mut self, name: &str, content: &[u8]) -> Result<()> {
        self.fill(name, |out| out.write_all(content))
            .map_err(Error::io(self.folder.join(name)))
    }

    pub fn copy(&mut self, from: &Path, name: &str) -> Result<()> {
        let mut source = File::open(from).map_err(Error::io(from))?;
        self.fill(name, |out| std::io::copy(&mut source, out).map(|_| ()))
            .map_err(Error::io(self.folder.join(name)))
    }

    pub fn safetensors(
        &mut self,
        name: &str,
        tensors: Vec<Tensor>,
        metadata: &[(&str, &str)],
    ) -> Result<()> {
        let path = self.folder.join(name);
        self.fill(name, |out| stream(out, tensors, metadata))
            .map_err(|failure| match failure {
                Failure::Io(error) => Error::io(path)(error),
                Failure::Other(error) => error,
            })
    }

    /// Renames every file into place, in the order they were written.
    pub fn commit(self) -> Result<()> {
        for name in &self.names {
            let target = self.folder.join(name);
            std::fs::rename(self.aside.path().join(name), &target).map_err(Error::io(target))?;
        }
        self.aside.close().map_err(Error::io(&self.folder))
    }
}
