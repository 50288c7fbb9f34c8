//! The weights of a model folder: `model.safetensors`, or `model.safetensors.index.json` and its shards.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use bytemuck::Pod;
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use safetensors::Dtype;

use super::header::SafetensorsFile;
use super::listing;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::quant::{self, Quantized4bit, TensorBytes};

#[cfg(target_endian = "big")]
compile_error!("safetensors is little-endian and its bytes are used in place");

pub(super) const SINGLE: &str = "model.safetensors";
pub(super) const INDEX: &str = "model.safetensors.index.json";

/// A tensor where it lies in the file: `bytes` are little-endian, row-major, at any alignment.
#[derive(Debug, Clone, Copy)]
pub struct TensorView<'a> {
    pub dtype: Dtype,
    pub shape: &'a [usize],
    pub bytes: &'a [u8],
}

impl TensorView<'_> {
    /// The floating-point type, where it is one the project computes with.
    pub fn float(&self) -> Option<DType> {
        match self.dtype {
            Dtype::F32 => Some(DType::F32),
            Dtype::F16 => Some(DType::F16),
            Dtype::BF16 => Some(DType::BF16),
            _ => None,
        }
    }

    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The elements as `T`, in place where the bytes are aligned; the caller knows that `dtype` is T's.
    pub fn elements<T: Pod>(&self) -> Cow<'_, [T]> {
        if let Ok(elements) = bytemuck::try_cast_slice(self.bytes) {
            return Cow::Borrowed(elements);
        }
        let mut elements = vec![T::zeroed(); self.bytes.len() / size_of::<T>()];
        bytemuck::cast_slice_mut(&mut elements).copy_from_slice(self.bytes);
        Cow::Owned(elements)
    }

    /// The values as `f32` (exact for all three types); `None` for a type that is not f32, f16 or bf16.
    pub fn to_f32(&self) -> Option<Vec<f32>> {
        let mut values = vec![0.0; self.len()];
        match self.float()? {
            DType::F32 => values.copy_from_slice(&self.elements::<f32>()),
            DType::F16 => self
                .elements::<f16>()
                .convert_to_f32_slice(values.as_mut_slice()),
            DType::BF16 => self
                .elements::<bf16>()
                .convert_to_f32_slice(values.as_mut_slice()),
        }
        Some(values)
    }
}

/// The memory-mapped weights of a folder, or of one safetensors file.
pub struct Weights {
    root: PathBuf,
    files: Vec<SafetensorsFile>,
    /// Which file holds each tensor.
    place: BTreeMap<String, usize>,
}

impl Weights {
    /// Opens a folder's weights: `model.safetensors` if it is there (as transformers prefers), else the index and its
    /// shards.
    ///
    /// # Errors
    /// `Format` if there is neither file, a file is truncated or malformed, the index names a shard or a tensor that
    /// is not there, or two shards hold one tensor; `Io` if the folder or a file cannot be read.
    pub fn open(folder: &Path) -> Result<Self> {
        std::fs::read_dir(folder).map_err(Error::io(folder))?;
        let single = folder.join(SINGLE);
        let index = folder.join(INDEX);
        if single.exists() {
            Self::open_file(&single)
        } else if index.exists() {
            Self::open_sharded(folder, &index)
        } else {
            Err(Error::format(
                folder,
                format!(
                    "missing {SINGLE} (or {INDEX} with its shards): {}",
                    listing(folder)
                ),
            ))
        }
    }

    /// Opens one safetensors file, whatever its name.
    pub fn open_file(path: &Path) -> Result<Self> {
        let mut weights = Self::empty(path);
        weights.add(path)?;
        Ok(weights)
    }

    fn empty(root: &Path) -> Self {
        Self {
            root: root.to_owned(),
            files: Vec::new(),
            place: BTreeMap::new(),
        }
    }

    fn open_sharded(folder: &Path, index: &Path) -> Result<Self> {
        let map = read_weight_map(index)?;
        let mut shards: Vec<&str> = map.values().map(String::as_str).collect();
        shards.sort_unstable();
        shards.dedup();
        let mut weights = Self::empty(folder);
        for shard in &shards {
            let path = folder.join(shard);
            if !path.exists() {
                return Err(Error::format(
                    index,
                    format!("names shard {shard}, which is missing: {}", listing(folder)),
                ));
            }
            weights.add(&path)?;
        }
        for (name, shard) in &map {
            let path = folder.join(shard);
            let found = weights
                .place
                .get(name)
                .map(|&file| &weights.files[file].path);
            if found != Some(&path) {
                let instead = found.map_or_else(String::new, |other| {
                    format!(" (it is in {})", other.display())
                });
                return Err(Error::format(
                    index,
                    format!(
                        "says that tensor '{name}' is in {shard}, which does not hold it{instead}"
                    ),
                ));
            }
        }
        Ok(weights)
    }

    fn add(&mut self, path: &Path) -> Result<()> {
        let file = SafetensorsFile::open(path)?;
        let number = self.files.len();
        for name in file.names() {
            if let Some(&other) = self.place.get(&name) {
                return Err(Error::format(
                    path,
                    format!(
                        "tensor '{name}' is also in {}",
                        self.files[other].path.display()
                    ),
                ));
            }
            self.place.insert(name, number);
        }
        self.files.push(file);
        Ok(())
    }

    /// The folder (or file) that was opened.
    pub fn path(&self) -> &Path {
        &self.root
    }

    /// All tensors' names, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.place.keys().map(String::as_str)
    }

    pub fn contains(&self, name: &str) -> bool {
        self.place.contains_key(name)
    }

    /// # Errors
    /// `Format` if there is no such tensor.
    pub fn get(&self, name: &str) -> Result<TensorView<'_>> {
        self.find(name).ok_or_else(|| {
            let last = name.rsplit('.').nth(1).unwrap_or(name);
            let mut near: Vec<&str> = self
                .names()
                .filter(|other| other.contains(last))
                .take(3)
                .collect();
            if near.is_empty() {
                near = self.names().take(3).collect();
            }
            Error::format(
                &self.root,
                format!(
                    "has no tensor '{name}'; it has {} tensors, among them {}",
                    self.place.len(),
                    near.join(", ")
                ),
            )
        })
    }

    fn find(&self, name: &str) -> Option<TensorView<'_>> {
        let (info, bytes) = self.files[*self.place.get(name)?].tensor(name)?;
        Some(TensorView {
            dtype: info.dtype,
            shape: &info.shape,
            bytes,
        })
    }

    /// The file that holds a tensor; the folder if none does.
    pub fn file_of(&self, name: &str) -> &Path {
        self.place
            .get(name)
            .map_or(&self.root, |&file| &self.files[file].path)
    }

    /// A floating-point tensor's values as `f32`.
    ///
    /// # Errors
    /// `Format` if there is no such tensor or its type is not F32, F16 or BF16.
    pub fn to_f32(&self, name: &str) -> Result<Vec<f32>> {
        let view = self.get(name)?;
        view.to_f32().ok_or_else(|| {
            Error::format(
                self.file_of(name),
                format!(
                    "tensor '{name}' has type {}; supported are F32, F16 and BF16",
                    view.dtype
                ),
            )
        })
    }

    /// The 4-bit weight that bitsandbytes saved as `name` and its companions (`name.absmax`, `name.quant_map`, …);
    /// `None` if `name` is not 4-bit.
    ///
    /// # Errors
    /// `Format` if a companion is missing or does not fit.
    pub fn quantized(&self, name: &str) -> Result<Option<Quantized4bit>> {
        let path = self.file_of(name);
        let found = quant::from_tensors(path, name, |key| {
            self.find(key).map(|view| TensorBytes {
                dtype: view.dtype,
                shape: view.shape,
                bytes: view.bytes,
            })
        })?;
        if found.is_none() && self.contains(&format!("{name}.absmax")) {
            return Err(Error::format(
                path,
                format!(
                    "'{name}' has an absmax but no '{name}.quant_state.bitsandbytes__nf4' or '…__fp4': not a 4-bit weight as bitsandbytes saves it"
                ),
            ));
        }
        Ok(found)
    }
}

fn read_weight_map(index: &Path) -> Result<BTreeMap<String, String>> {
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let text = std::fs::read(index).map_err(Error::io(index))?;
    let parsed: Index = serde_json::from_slice(&text)
        .map_err(|error| Error::format(index, format!("not an index of shards: {error}")))?;
    if let Some((name, shard)) = parsed.weight_map.iter().find(|(_, shard)| {
        shard.is_empty() || shard.contains(['/', '\\']) || shard.as_str() == ".."
    }) {
        return Err(Error::format(
            index,
            format!(
                "tensor '{name}' is said to be in '{shard}', which is not the name of a file beside it"
            ),
        ));
    }
    Ok(parsed.weight_map)
}
