//! One memory-mapped safetensors file and its validated header.
//!
//! Layout: u64 little-endian header length n, n bytes of JSON, then the tensors' bytes without gaps.

use std::collections::HashSet;
use std::fs::File;
use std::path::{Path, PathBuf};

use memmap2::Mmap;
use safetensors::tensor::{Metadata, TensorInfo};
use serde::de::{Deserializer, IgnoredAny, MapAccess, Visitor};

use crate::error::{Error, Result};

/// Bytes of the header's length.
pub(super) const PREFIX: usize = 8;
/// The safetensors crate's own limit.
pub(super) const MAX_HEADER: usize = 100_000_000;

pub(super) struct SafetensorsFile {
    pub path: PathBuf,
    map: Mmap,
    /// Offset of the first tensor's bytes.
    start: usize,
    metadata: Metadata,
}

impl SafetensorsFile {
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(Error::io(path))?;
        let length = file.metadata().map_err(Error::io(path))?.len();
        if length < PREFIX as u64 {
            return Err(Error::format(
                path,
                format!(
                    "truncated: {length} bytes, and a safetensors file has at least {PREFIX}; copy or download it again"
                ),
            ));
        }
        // SAFETY: the map is read-only and lives no longer than this struct. Files here are replaced by renaming,
        // never rewritten in place, so the mapped inode keeps its length; another program that truncates the file
        // while it is open would end the process, as with every memory-mapped reader.
        let map = unsafe { Mmap::map(&file) }.map_err(Error::io(path))?;
        let (start, metadata) = parse(&map).map_err(|message| Error::format(path, message))?;
        Ok(Self {
            path: path.to_owned(),
            map,
            start,
            metadata,
        })
    }

    pub fn names(&self) -> Vec<String> {
        self.metadata.offset_keys()
    }

    /// Type, shape and bytes of a tensor of this file.
    pub fn tensor(&self, name: &str) -> Option<(&TensorInfo, &[u8])> {
        let info = self.metadata.info(name)?;
        let (begin, end) = info.data_offsets;
        // `parse` has compared the last offset with the file's length.
        Some((info, &self.map[self.start + begin..self.start + end]))
    }
}

/// Offset of the data and the header's content, checked against the file's length.
fn parse(bytes: &[u8]) -> std::result::Result<(usize, Metadata), String> {
    let mut prefix = [0; PREFIX];
    prefix.copy_from_slice(&bytes[..PREFIX]);
    let header = u64::from_le_bytes(prefix);
    let start = usize::try_from(header)
        .ok()
        .filter(|&n| n <= MAX_HEADER)
        .map(|n| n + PREFIX)
        .ok_or_else(|| {
            format!("not a safetensors file: it claims a header of {header} bytes (at most {MAX_HEADER})")
        })?;
    let Some(json) = bytes.get(PREFIX..start) else {
        return Err(format!(
            "truncated inside its header: expected {start} bytes and the tensors after them, found {} bytes; \
             copy or download it again",
            bytes.len()
        ));
    };
    if let Some(name) = duplicate_key(json) {
        return Err(format!("its header names tensor '{name}' twice"));
    }
    let metadata: Metadata = serde_json::from_slice(json)
        .map_err(|error| format!("its safetensors header cannot be used: {error}"))?;
    let expected = metadata.data_len().saturating_add(start);
    let found = bytes.len();
    if found < expected {
        return Err(format!(
            "truncated: expected {expected} bytes, found {found}; copy or download it again"
        ));
    }
    if found > expected {
        return Err(format!(
            "{} bytes too long: its header describes {expected} bytes, found {found}",
            found - expected
        ));
    }
    Ok((start, metadata))
}

/// The first key that the JSON object names twice: the crate would keep the last one silently.
fn duplicate_key(json: &[u8]) -> Option<String> {
    struct Keys(Option<String>);
    impl<'de> Visitor<'de> for &mut Keys {
        type Value = ();
        fn expecting(&self, formatter: &mut std::fmt::Formatter) -> std::fmt::Result {
            formatter.write_str("a JSON object")
        }
        fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<(), A::Error> {
            let mut seen = HashSet::new();
            while let Some(key) = map.next_key::<String>()? {
                map.next_value::<IgnoredAny>()?;
                if let Some(twice) = seen.replace(key) {
                    self.0.get_or_insert(twice);
                }
            }
            Ok(())
        }
    }
    let mut keys = Keys(None);
    // A header that does not parse is reported by the caller's own parse.
    let _ = serde_json::Deserializer::from_slice(json).deserialize_map(&mut keys);
    keys.0
}
