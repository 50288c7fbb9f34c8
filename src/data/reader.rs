//! Files, one record at a time: the reader trait, the choice of a reader by a file's extension, and lists of files.
//!
//! | extension | a record is | columns |
//! |---|---|---|
//! | `.txt` | a paragraph: lines up to a blank line. In a file without blank lines, a line | none: it is all text |
//! | `.jsonl` | a line holding a JSON object | its keys |
//! | `.csv` | a row; the first row is the header | by the header |
//! | `.parquet` | a row | string columns by name; no others are read |
//!
//! What stops the reading, with one error: a file that cannot be opened, an unknown extension, a column that no record
//! has, content that is not the format's, invalid UTF-8, a record over [`MAX_RECORD_BYTES`]. What is skipped, counted and
//! reported: a record whose text is empty, white space, null or absent, or contains a NUL byte, and a file of no records.

use std::fs;
use std::path::{Path, PathBuf};

use super::columns::Columns;
use super::formats;
use super::record::{Item, Reason, Skip};
use crate::error::{Error, Result};

/// Longest line, paragraph, row or value that a reader takes: bounds the memory a hostile file can claim.
pub const MAX_RECORD_BYTES: usize = 32 << 20;

/// Extensions of the files that can be read.
pub const EXTENSIONS: [&str; 4] = ["txt", "jsonl", "csv", "parquet"];

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
    let extension = extension(path).ok_or_else(|| {
        Error::format(
            path,
            format!("unknown kind of data file; known are {}", known()),
        )
    })?;
    let size = fs::metadata(path).map_err(Error::io(path))?.len();
    if size == 0 {
        return Ok(Box::new(Empty(path.to_owned())));
    }
    Ok(match extension {
        "txt" => Box::new(formats::Text::open(path, columns)?),
        "jsonl" => Box::new(formats::JsonLines::open(path, columns)?),
        "csv" => Box::new(formats::Csv::open(path, columns)?),
        _ => Box::new(formats::Parquet::open(path, columns)?),
    })
}

/// A file of no bytes, which no format's own reader needs to know.
struct Empty(PathBuf);

impl Iterator for Empty {
    type Item = Result<Item>;

    fn next(&mut self) -> Option<Self::Item> {
        None
    }
}

impl Reader for Empty {
    fn path(&self) -> &Path {
        &self.0
    }
}

/// Several files and folders as one stream; records carry the index of their file in [`Files::paths`].
pub struct Files {
    paths: Vec<PathBuf>,
    columns: Columns,
    /// Index into `paths` of the file that `current` reads, or of the next one to open.
    file: usize,
    current: Option<Box<dyn Reader>>,
    /// Whether `current` has given anything.
    any: bool,
}

impl Files {
    /// Expands folders (see [`expand`]); each file is opened when its turn comes.
    ///
    /// # Errors
    /// Those of [`expand`] and [`Columns::validate`].
    pub fn open(paths: &[PathBuf], columns: &Columns) -> Result<Self> {
        columns.validate()?;
        Ok(Self {
            paths: expand(paths)?,
            columns: columns.clone(),
            file: 0,
            current: None,
            any: false,
        })
    }

    /// The files, folders expanded.
    pub fn paths(&self) -> &[PathBuf] {
        &self.paths
    }

    fn advance(&mut self) -> Result<Option<Item>> {
        loop {
            let Some(path) = self.paths.get(self.file) else {
                return Ok(None);
            };
            let reader = match &mut self.current {
                Some(reader) => reader,
                None => self.current.insert(open(path, &self.columns)?),
            };
            if let Some(item) = reader.next() {
                self.any = true;
                return item.map(|item| Some(with_file(item, self.file)));
            }
            let file = self.file;
            self.file += 1;
            self.current = None;
            if !std::mem::take(&mut self.any) {
                return Ok(Some(Item::Skip(Skip {
                    file,
                    number: 0,
                    reason: Reason::EmptyFile,
                })));
            }
        }
    }
}

impl Iterator for Files {
    type Item = Result<Item>;

    fn next(&mut self) -> Option<Self::Item> {
        let next = self.advance();
        if next.is_err() {
            self.current = None;
            self.file = self.paths.len();
        }
        next.transpose()
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
    if paths.is_empty() {
        return Err(Error::argument("data names no file"));
    }
    let mut files = Vec::new();
    for path in paths {
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

fn extension(path: &Path) -> Option<&'static str> {
    let found = path.extension()?.to_str()?;
    EXTENSIONS
        .into_iter()
        .find(|known| known.eq_ignore_ascii_case(found))
}

fn known() -> String {
    EXTENSIONS.map(|name| format!(".{name}")).join(", ")
}
