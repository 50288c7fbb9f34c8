//! config.json and its kind: a JSON object with typed access, whose errors name the file and the field.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::listing;
use crate::dtype::DType;
use crate::error::{Error, Result};

/// A JSON object of a model folder, or one of its nested objects. A field that is `null` counts as absent.
#[derive(Debug, Clone)]
pub struct ConfigFile {
    path: PathBuf,
    /// Path of a nested object with its trailing dot (`rope_parameters.`), empty at the top.
    at: String,
    map: Map<String, Value>,
}

impl ConfigFile {
    /// Reads `config.json` of a model folder.
    ///
    /// # Errors
    /// `Format` if the file is missing or is not a JSON object; `Io` if the folder or the file cannot be read.
    pub fn open(folder: &Path) -> Result<Self> {
        std::fs::read_dir(folder).map_err(Error::io(folder))?;
        Self::open_optional(folder, "config.json")?.ok_or_else(|| {
            Error::format(folder, format!("missing config.json: {}", listing(folder)))
        })
    }

    /// Reads another JSON file of the folder (`generation_config.json`); `None` if it is not there.
    pub fn open_optional(folder: &Path, name: &str) -> Result<Option<Self>> {
        let path = folder.join(name);
        match std::fs::read(&path) {
            Ok(text) => Self::parse(&path, &text).map(Some),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(Error::io(&path)(error)),
        }
    }

    fn parse(path: &Path, text: &[u8]) -> Result<Self> {
        let value: Value = serde_json::from_slice(text)
            .map_err(|error| Error::format(path, format!("not valid JSON: {error}")))?;
        match value {
            Value::Object(map) => Ok(Self {
                path: path.to_owned(),
                at: String::new(),
                map,
            }),
            other => Err(Error::format(
                path,
                format!("must be a JSON object, not {}", kind(&other)),
            )),
        }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// All fields, in the file's order.
    pub fn fields(&self) -> &Map<String, Value> {
        &self.map
    }

    /// The same file with `changes` over its fields.
    pub fn with(mut self, changes: Map<String, Value>) -> Self {
        self.map.extend(changes);
        self
    }

    /// JSON as transformers writes it: two spaces, a final newline.
    pub fn text(&self) -> String {
        pretty(&Value::Object(self.map.clone()))
    }

    /// The field's value; `None` if it is absent or null.
    pub fn opt(&self, key: &str) -> Option<&Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    fn need<T>(&self, key: &str, found: Option<T>) -> Result<T> {
        found.ok_or_else(|| {
            Error::format(
                &self.path,
                format!("missing field '{}{key}', which the model needs", self.at),
            )
        })
    }

    /// An error about one field's value.
    pub fn wrong(&self, key: &str, expected: &str) -> Error {
        let found = self.map.get(key).map_or("nothing".to_owned(), kind);
        Error::format(
            &self.path,
            format!("field '{}{key}' must be {expected}, not {found}", self.at),
        )
    }

    fn typed<'a, T>(
        &'a self,
        key: &str,
        expected: &str,
        convert: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>> {
        self.opt(key)
            .map(|value| convert(value).ok_or_else(|| self.wrong(key, expected)))
            .transpose()
    }

    pub fn usize_opt(&self, key: &str) -> Result<Option<usize>> {
        self.typed(key, "a whole number", |value| {
            value.as_u64().and_then(|n| usize::try_from(n).ok())
        })
    }

    pub fn usize(&self, key: &str) -> Result<usize> {
        self.need(key, self.usize_opt(key)?)
    }

    pub fn usize_or(&self, key: &str, default: usize) -> Result<usize> {
        Ok(self.usize_opt(key)?.unwrap_or(default))
    }

    pub fn f64_opt(&self, key: &str) -> Result<Option<f64>> {
        self.typed(key, "a number", Value::as_f64)
    }

    pub fn f64(&self, key: &str) -> Result<f64> {
        self.need(key, self.f64_opt(key)?)
    }

    pub fn f64_or(&self, key: &str, default: f64) -> Result<f64> {
        Ok(self.f64_opt(key)?.unwrap_or(default))
    }

    pub fn bool_or(&self, key: &str, default: bool) -> Result<bool> {
        Ok(self
            .typed(key, "true or false", Value::as_bool)?
            .unwrap_or(default))
    }

    pub fn str_opt(&self, key: &str) -> Result<Option<&str>> {
        self.typed(key, "a string", Value::as_str)
    }

    pub fn str(&self, key: &str) -> Result<&str> {
        self.need(key, self.str_opt(key)?)
    }

    /// A nested object, whose errors name it (`rope_scaling.factor`); `None` if absent.
    pub fn section(&self, key: &str) -> Result<Option<Self>> {
        self.typed(key, "an object", Value::as_object).map(|found| {
            found.map(|map| Self {
                path: self.path.clone(),
                at: format!("{}{key}.", self.at),
                map: map.clone(),
            })
        })
    }

    /// A token id or a list of them (`eos_token_id` may be either); empty if absent.
    pub fn token_ids(&self, key: &str) -> Result<Vec<u32>> {
        let id = |value: &Value| value.as_u64().and_then(|n| u32::try_from(n).ok());
        Ok(self
            .typed(
                key,
                "a token id or a list of token ids",
                |value| match value {
                    Value::Array(items) => items.iter().map(id).collect(),
                    one => id(one).map(|id| vec![id]),
                },
            )?
            .unwrap_or_default())
    }

    /// The first of `architectures`, such as `LlamaForCausalLM`.
    pub fn architecture(&self) -> Result<&str> {
        let first = self.typed("architectures", "a list of class names", |value| {
            value.as_array()?.first()?.as_str()
        })?;
        self.need("architectures", first)
    }

    /// The weights' type: `dtype`, or `torch_dtype` as it was called before; `None` if the file does not say.
    pub fn dtype(&self) -> Result<Option<DType>> {
        for key in ["dtype", "torch_dtype"] {
            if let Some(name) = self.str_opt(key)? {
                let name = name.strip_prefix("torch.").unwrap_or(name);
                return DType::from_torch_name(name)
                    .map(Some)
                    .map_err(|error| Error::format(&self.path, format!("field '{key}': {error}")));
            }
        }
        Ok(None)
    }
}

/// The folder's `tokenizer.json`.
///
/// # Errors
/// `Format` if it is missing, with what the folder has instead.
pub fn tokenizer_file(folder: &Path) -> Result<PathBuf> {
    let path = folder.join("tokenizer.json");
    if path.exists() {
        return Ok(path);
    }
    let hint = if folder.join("tokenizer.model").exists() {
        "; tokenizer.model alone is not read: AutoTokenizer.from_pretrained(folder).save_pretrained(folder) writes tokenizer.json"
    } else {
        ""
    };
    Err(Error::format(
        folder,
        format!("missing tokenizer.json: {}{hint}", listing(folder)),
    ))
}

/// A JSON value in the words of an error message.
pub(crate) fn kind(value: &Value) -> String {
    match value {
        Value::Null => "null".to_owned(),
        Value::Array(_) => "a list".to_owned(),
        Value::Object(_) => "an object".to_owned(),
        scalar => scalar.to_string(),
    }
}

/// JSON as transformers writes it: two spaces, a final newline.
pub(super) fn pretty(value: &Value) -> String {
    format!("{value:#}\n")
}
