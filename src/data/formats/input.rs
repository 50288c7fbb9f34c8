//! A file's bytes, unpacked where its name ends in .gz or .zst.

use std::fs::File;
use std::io::{BufReader, Read, Seek};
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// Largest file that is unpacked to disk, for a format that is not read from front to back.
const MAX_UNPACKED_BYTES: u64 = 64 << 30;
/// Largest window (log2 of bytes) that a zstd frame may ask for: zstd's own limit unless told otherwise.
const ZSTD_WINDOW_LOG: u32 = 27;

/// How a file is packed, by the end of its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Packing {
    None,
    Gzip,
    Zstd,
}

impl Packing {
    /// The packing, and the name without its ending.
    pub fn of(path: &Path) -> (Self, PathBuf) {
        let ending = path.extension().and_then(|ending| ending.to_str());
        let packing = match ending {
            Some(ending) if ending.eq_ignore_ascii_case("gz") => Self::Gzip,
            Some(ending) if ending.eq_ignore_ascii_case("zst") => Self::Zstd,
            _ => return (Self::None, path.to_owned()),
        };
        (packing, path.with_extension(""))
    }

    fn name(self) -> &'static str {
        match self {
            Self::None => "plain",
            Self::Gzip => "gzip",
            Self::Zstd => "zstd",
        }
    }
}

/// The unpacked bytes of a file, from front to back.
pub struct Input {
    path: PathBuf,
    packing: Packing,
    reader: Box<dyn Read + Send>,
}

impl Input {
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(Error::io(path))?;
        let (packing, _) = Packing::of(path);
        let reader: Box<dyn Read + Send> = match packing {
            Packing::None => Box::new(file),
            Packing::Gzip => Box::new(flate2::bufread::MultiGzDecoder::new(BufReader::new(file))),
            Packing::Zstd => {
                let mut decoder = zstd::Decoder::new(file).map_err(Error::io(path))?;
                decoder
                    .window_log_max(ZSTD_WINDOW_LOG)
                    .map_err(Error::io(path))?;
                Box::new(decoder)
            }
        };
        Ok(Self {
            path: path.to_owned(),
            packing,
            reader,
        })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The error that a failed read of this file is.
    pub fn error(&self, source: std::io::Error) -> Error {
        unreadable(&self.path, self.packing, source)
    }
}

/// The operating system's errors are its own; others come from the unpacking.
pub fn unreadable(path: &Path, packing: Packing, source: std::io::Error) -> Error {
    if source.raw_os_error().is_some() || packing == Packing::None {
        return Error::io(path)(source);
    }
    Error::format(
        path,
        format!(
            "the {} stream is damaged or cut off: {source}",
            packing.name()
        ),
    )
}

impl Read for Input {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        self.reader.read(buffer)
    }
}

/// The file itself, or its unpacked content in a nameless temporary file.
pub fn seekable(path: &Path) -> Result<File> {
    if Packing::of(path).0 == Packing::None {
        return File::open(path).map_err(Error::io(path));
    }
    let mut input = Input::open(path)?;
    let mut file = tempfile::tempfile().map_err(Error::io(std::env::temp_dir()))?;
    let mut buffer = vec![0; 1 << 16];
    let mut size = 0u64;
    loop {
        let read = match input.read(&mut buffer) {
            Ok(0) => break,
            Ok(read) => read,
            Err(error) => return Err(input.error(error)),
        };
        size += read as u64;
        if size > MAX_UNPACKED_BYTES {
            return Err(Error::format(
                path,
                format!(
                    "unpacks to more than {} GiB; unpack it first",
                    MAX_UNPACKED_BYTES >> 30
                ),
            ));
        }
        std::io::Write::write_all(&mut file, &buffer[..read])
            .map_err(Error::io(std::env::temp_dir()))?;
    }
    file.rewind().map_err(Error::io(std::env::temp_dir()))?;
    Ok(file)
}
