//! A model folder's chat template and special tokens, where transformers looks for them.

use std::path::Path;

use serde_json::{Map, Value};

use super::ChatTemplate;
use crate::error::{Error, Result};

/// Largest file that is read.
const MAX_FILE_BYTES: u64 = 16 << 20;
/// The folder of templates beside `chat_template.jinja`.
const ADDITIONAL: &str = "additional_chat_templates";

impl ChatTemplate {
    /// The template of `chat_template.jinja` (and `additional_chat_templates/tool_use.jinja`), or of `chat_template` in
    /// tokenizer_config.json; `None` where the folder has neither.
    ///
    /// # Errors
    /// A file that cannot be read, and a template that cannot be compiled.
    pub fn from_folder(folder: &Path) -> Result<Option<Self>> {
        let config_path = folder.join("tokenizer_config.json");
        let config = match read(&config_path)? {
            Some(text) => serde_json::from_str(&text)
                .map_err(|error| Error::format(&config_path, format!("not valid JSON: {error}")))?,
            None => Value::Null,
        };
        let path = folder.join("chat_template.jinja");
        let (path, default, tool_use) = match read(&path)? {
            Some(default) => {
                let tool_use = read(&folder.join(ADDITIONAL).join("tool_use.jinja"))?;
                (path, default, tool_use)
            }
            None => match templates(&config) {
                Ok(Some((default, tool_use))) => (config_path, default, tool_use),
                Ok(None) => return Ok(None),
                Err(message) => return Err(Error::format(&config_path, message)),
            },
        };
        Self::new(&default, tool_use.as_deref(), special_tokens(&config))
            .map(Some)
            .map_err(|error| Error::format(path, error.to_string()))
    }
}

fn read(path: &Path) -> Result<Option<String>> {
    let size = match std::fs::metadata(path) {
        Ok(found) => found.len(),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Error::io(path)(error)),
    };
    if size > MAX_FILE_BYTES {
        let limit = MAX_FILE_BYTES >> 20;
        return Err(Error::format(path, format!("larger than {limit} MiB")));
    }
    let bytes = std::fs::read(path).map_err(Error::io(path))?;
    String::from_utf8(bytes)
        .map(Some)
        .map_err(|error| Error::format(path, format!("not UTF-8: {error}")))
}

/// `chat_template`: one template, or several by name.
type Templates = Option<(String, Option<String>)>;

fn templates(config: &Value) -> std::result::Result<Templates, String> {
    match config.get("chat_template") {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(source)) => Ok(Some((source.clone(), None))),
        Some(Value::Array(named)) => {
            let find = |wanted: &str| {
                named.iter().find_map(|entry| {
                    let is = entry.get("name").and_then(Value::as_str) == Some(wanted);
                    let source = entry.get("template").and_then(Value::as_str);
                    source.filter(|_| is).map(str::to_owned)
                })
            };
            match find("default") {
                Some(default) => Ok(Some((default, find("tool_use")))),
                None => Err("chat_template has no template named `default`".to_owned()),
            }
        }
        Some(_) => Err("chat_template is neither a template nor a list of them".to_owned()),
    }
}

/// `bos_token` and the like, each the token's text.
fn special_tokens(config: &Value) -> Map<String, Value> {
    let settings = config.as_object().into_iter().flatten();
    settings
        .filter(|(name, _)| name.ends_with("_token"))
        .filter_map(|(name, token)| {
            let text = token.get("content").unwrap_or(token);
            text.is_string().then(|| (name.clone(), text.clone()))
        })
        .collect()
}
