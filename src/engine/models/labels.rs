//! The classes of a classification model, and config.json's `id2label`.

use serde_json::{Map, Value, json};

use crate::error::Result;
use crate::folder::ConfigFile;

/// What transformers calls a class that has no name.
const NAMELESS: &str = "LABEL_";

/// Names of the classes, in the order of the head's outputs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Labels {
    pub names: Vec<String>,
    /// Whether the stored head (if any) is for other classes, so that a new one is made.
    pub fresh: bool,
}

impl Labels {
    /// The stored head's: `id2label`, or `num_labels`, or transformers' two.
    pub fn read(file: &ConfigFile) -> Result<Self> {
        let wrong = || {
            file.wrong(
                "id2label",
                "an object that names the classes 0, 1, … in order",
            )
        };
        let names = match file.section("id2label")? {
            Some(section) => (0..section.fields().len())
                .map(|at| {
                    let name = section.fields().get(&at.to_string());
                    name.and_then(Value::as_str).map(str::to_owned)
                })
                .collect::<Option<Vec<_>>>()
                .ok_or_else(wrong)?,
            None => (0..file.usize_or("num_labels", 2)?)
                .map(|at| format!("{NAMELESS}{at}"))
                .collect(),
        };
        if names.is_empty() {
            return Err(wrong());
        }
        Ok(Self {
            names,
            fresh: false,
        })
    }

    /// A new head's: `labels` in their order, whole numbers by size.
    pub fn fresh(labels: impl IntoIterator<Item = String>) -> Self {
        let mut names: Vec<String> = labels.into_iter().collect();
        if names.iter().all(|name| name.parse::<i64>().is_ok()) {
            names.sort_by_key(|name| name.parse::<i64>().unwrap_or_default());
        } else {
            names.sort();
        }
        names.dedup();
        Self { names, fresh: true }
    }

    pub fn len(&self) -> usize {
        self.names.len()
    }

    pub fn is_empty(&self) -> bool {
        self.names.is_empty()
    }

    /// The class that `label` names: by its name, or by its number where the classes have no names.
    pub fn index(&self, label: &str) -> Option<usize> {
        let named = self.names.iter().position(|name| name == label);
        named.or_else(|| {
            let is_nameless = |(at, name): (usize, &String)| *name == format!("{NAMELESS}{at}");
            let number = label.parse::<usize>().ok()?;
            let nameless = self.names.iter().enumerate().all(is_nameless);
            (nameless && number < self.len()).then_some(number)
        })
    }

    /// `id2label` and `label2id`.
    pub fn to_json(&self) -> [(&'static str, Value); 2] {
        let by_id = self.names.iter().enumerate();
        let by_id: Map<String, Value> = by_id
            .map(|(id, name)| (id.to_string(), json!(name)))
            .collect();
        let by_name = self.names.iter().enumerate();
        let by_name: Map<String, Value> = by_name
            .map(|(id, name)| (name.clone(), json!(id)))
            .collect();
        [
            ("id2label", Value::Object(by_id)),
            ("label2id", Value::Object(by_name)),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_go_by_size_and_texts_by_letters() {
        let of =
            |labels: &[&str]| Labels::fresh(labels.iter().map(|&label| label.to_owned())).names;
        assert_eq!(of(&["10", "9", "9", "-1"]), ["-1", "9", "10"]);
        assert_eq!(of(&["b", "10", "9"]), ["10", "9", "b"]);
    }

    #[test]
    fn numbers_name_classes_that_have_no_names() {
        let nameless = Labels {
            names: vec!["LABEL_0".to_owned(), "LABEL_1".to_owned()],
            fresh: false,
        };
        assert_eq!(nameless.index("1"), Some(1));
        assert_eq!(nameless.index("LABEL_0"), Some(0));
        assert_eq!(nameless.index("2"), None);
        let named = Labels::fresh(["no".to_owned(), "yes".to_owned()]);
        assert_eq!(named.index("1"), None);
        assert_eq!(named.index("yes"), Some(1));
    }
}
