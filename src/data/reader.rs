//! Files, one record at a time: the reader trait, the choice of a reader by a file's extension, and lists of files.
//!
//! | extension | a record is | columns |
//! |---|---|---|
//! | `.txt` | a paragraph: lines up to a blank line. In a file without blank lines, a line | none: it is all text |
//! | `.jsonl` | a line holding a JSON object | its keys |
//! | `.csv`, `.tsv` | a row; the first row is the header | by the header |
//! | `.parquet` | a row | by name; no others are read |
//! | `.arrow` | a row of an IPC file or stream | by name |
//!
//! Each may be packed: `.jsonl.gz`, `.csv.zst`. Files are read on one thread and parsed on all of rayon's, a block ahead;
//! the records come in the files' order.
//!
//! What stops the reading, with one error: a file that cannot be opened, an unknown extension, a column that no record
//! has, content that is not the format's, invalid UTF-8, a record over [`MAX_RECORD_BYTES`], a packed file that is cut
//! off. What is skipped, counted and reported: a record whose text is empty, white space, null or absent, or contains a
//! NUL byte, messages that are no conversation, and a file of no records.

use std::fs;
use std::path::{Path, PathBuf};

use super::columns::Columns;
use super::formats::{self, Frames};
use super::record::{Item, Reason, Skip};
use super::stream::{Blocks, Found, Stream};
use crate::error::{Error, Result};

/// Longest line, paragraph, row or value that a reader takes: bounds the memory a hostile file can claim.
pub const MAX_RECORD_BYTES: usize = 32 << 20;

/// Extensions of the files that can be read.
pub const EXTENSIONS: [&str; 6] = ["txt", "jsonl", "csv", "tsv", "parquet", "arrow"];

/// Folders nested deeper than this are taken for a loop of links.
const MAX_FOLDER_DEPTH: usize = 32;

/// Streams the records of one file in order. Nothing is to be read after an error.
pub trait Reader: Iterator<Item = Result<Item>> + Send {
    /// The file being read.
    fn path(&self) -> &Path;
}

/// Opens a file by its extension; records come with file index 0.
///
/// # Errors
/// [`Error::Io`] when it cannot be opened; [`Error::Format`] for an unknown extension, a header without the columns, or
/// columns named for a `.txt`.
pub fn open(path: &Path, columns: &Columns) -> Result<Box<dyn Reader>> {
    columns.validate()?;
    let source = source(path, columns, &Frames::new())?;
    Ok(Box::new(Single {
        path: path.to_owned(),
        stream: Stream::new(Box::new(std::iter::once(Ok(source)))),
    }))
}

/// The reader of a file or of a frame.
fn source(path: &Path, columns: &Columns, frames: &Frames) -> Result<Box<dyn Blocks>> {
    if let Some(frame) = frames.get(path) {
        return Ok(Box::new(formats::FrameReader::open(path, frame, columns)?));
    }
    let extension = extension(path).ok_or_else(|| {
        Error::format(
            path,
            format!("unknown kind of data file; known are {}", known()),
        )
    })?;
    let size = fs::metadata(path).map_err(Error::io(path))?.len();
    if size == 0 {
        return Ok(Box::new(Empty));
    }
    Ok(match extension {
        "txt" => Box::new(formats::Text::open(path, columns)?),
        "jsonl" => Box::new(formats::JsonLines::open(path, columns)?),
        "csv" => Box::new(formats::Csv::open(path, b',', columns)?),
        "tsv" => Box::new(formats::Csv::open(path, b'\t', columns)?),
        "arrow" => Box::new(formats::Arrow::open(path, columns)?),
        _ => Box::new(formats::Parquet::open(path, columns)?),
    })
}

/// A file of no bytes, which no format's own reader needs to know.
struct Empty;

impl Blocks for Empty {
    fn next_block(&mut self) -> Result<Option<super::stream::Block>> {
        Ok(None)
    }
}

struct Single {
    path: PathBuf,
    stream: Stream,
}

impl Iterator for Single {
    type Item = Result<Item>;

    fn next(&mut self) -> Option<Self::Item> {
        match self.stream.next()? {
            Ok((_, Found::Item(item))) => Some(Ok(item)),
            Ok((_, Found::Empty)) => None,
            Err(error) => Some(Err(error)),
        }
    }
}

impl Reader for Single {
    fn path(&self) -> &Path {
        &self.path
    }
}

/// Several files and folders as one stream; records carry the index of their file in [`Files::paths`].
pub struct Files {
    paths: Vec<PathBuf>,
    stream: Stream,
}

impl Files {
    /// Expands folders (see [`expand`]); each file is opened when its turn comes.
    ///
    /// # Errors
    /// Those of [`expand`] and [`Columns::validate`].
    pub fn open(paths: &[PathBuf], columns: &Columns) -> Result<Self> {
        Self::with_frames(paths, columns, &Frames::new())
    }

    /// As [`Files::open`]; a path that `frames` has stands for that frame.
    ///
    /// # Errors
    /// As [`Files::open`]'s.
    pub fn with_frames(paths: &[PathBuf], columns: &Columns, frames: &Frames) -> Result<Self> {
        columns.validate()?;
        let paths = expand_with(paths, frames)?;
        let (columns, frames) = (columns.clone(), frames.clone());
        let sources = paths
            .clone()
            .into_iter()
            .map(move |path| source(&path, &columns, &frames));
        Ok(Self {
            paths,
            stream: Stream::new(Box::new(sources)),
        })
    }

    /// The files, folders expanded.
    pub fn paths(&self) -> &[PathBuf] {
        &self.paths
    }
}

impl Iterator for Files {
    type Item = Result<Item>;

    fn next(&mut self) -> Option<Self::Item> {
        Some(self.stream.next()?.map(|(file, found)| match found {
            Found::Item(item) => with_file(item, file),
            Found::Empty => Item::Skip(Skip {
                file,
                number: 0,
                reason: Reason::EmptyFile,
            }),
        }))
    }
}

fn with_file(item: Item, file: usize) -> Item {
    match item {
        Item::Record(mut record) => {
            record.file = file;
            Item::Record(record)
        }
        Item::Skip(mut skip) => {
            skip.file = file;
            Item::Skip(skip)
        }
    }
}

/// Replaces each folder by the data files in it and below it, sorted by path; hidden files, hidden folders and files of
/// other kinds are passed over. Files that are named are kept whatever they are called.
///
/// # Errors
/// A path that does not exist, or a folder without data files.
pub fn expand(paths: &[PathBuf]) -> Result<Vec<PathBuf>> {
    expand_with(paths, &Frames::new())
}

fn expand_with(paths: &[PathBuf], frames: &Frames) -> Result<Vec<PathBuf>> {
    if paths.is_empty() {
        return Err(Error::argument("data names no file"));
    }
    let mut files = Vec::new();
    for path in paths {
        if frames.contains_key(path) {
            files.push(path.clone());
            continue;
        }
        if frames.is_empty() && path.to_string_lossy().starts_with('<') && !path.exists() {
            return Err(Error::argument(format!(
                "{} was a table in memory: give it from Python, or name files",
                path.display()
            )));
        }
        if !fs::metadata(path).map_err(Error::io(path))?.is_dir() {
            files.push(path.clone());
            continue;
        }
        let before = files.len();
        walk(path, 0, &mut files)?;
        if files.len() == before {
            return Err(Error::format(
                path,
                format!("the folder holds no data files; known are {}", known()),
            ));
        }
        files[before..].sort();
    }
    Ok(files)
}

fn walk(folder: &Path, depth: usize, files: &mut Vec<PathBuf>) -> Result<()> {
    if depth > MAX_FOLDER_DEPTH {
        return Err(Error::format(folder, "folders are nested too deep"));
    }
    for entry in fs::read_dir(folder).map_err(Error::io(folder))? {
        let entry = entry.map_err(Error::io(folder))?;
        let path = entry.path();
        if entry.file_name().as_encoded_bytes().starts_with(b".") {
            continue;
        }
        if fs::metadata(&path).map_err(Error::io(&path))?.is_dir() {
            walk(&path, depth + 1, files)?;
        } else if extension(&path).is_some() {
            files.push(path);
        }
    }
    Ok(())
}

/// The kind of a file by its name, its packing aside.
fn extension(path: &Path) -> Option<&'static str> {
    let (_, name) = formats::Packing::of(path);
    let found = name.extension()?.to_str()?;
    EXTENSIONS
        .into_iter()
        .find(|known| known.eq_ignore_ascii_case(found))
}

fn known() -> String {
    let names = EXTENSIONS.map(|name| format!(".{name}")).join(", ");
    format!("{names}, also with .gz or .zst behind")
}
