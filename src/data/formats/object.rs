//! A JSON object of which only some keys are wanted: the rest is checked and dropped as it streams by.

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};

use crate::data::json::Json;

/// Keys remembered for the error about a column that no line has.
const REMEMBERED_KEYS: usize = 1000;

/// The value of a wanted key.
pub enum Value {
    Missing,
    Null,
    Text(String),
    /// A number or truth value, which a group may be.
    Scalar(&'static str, String),
    /// A list or an object, as JSON, of a key that may hold one.
    Nested(String),
    Other(&'static str),
}

/// Parses an object into the values of the wanted keys.
pub struct Object<'a> {
    pub wanted: &'a [String],
    /// Of each wanted key: whether a list or an object is kept.
    pub nested: &'a [bool],
    /// Takes in every key that is met.
    pub keys: Option<&'a mut BTreeSet<String>>,
}

impl<'de> DeserializeSeed<'de> for Object<'_> {
    type Value = Vec<Value>;

    fn deserialize<D: Deserializer<'de>>(self, parser: D) -> Result<Self::Value, D::Error> {
        parser.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Object<'_> {
    type Value = Vec<Value>;

    fn expecting(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        formatter.write_str("one JSON object a line")
    }

    fn visit_map<A: MapAccess<'de>>(mut self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut values: Vec<Value> = self.wanted.iter().map(|_| Value::Missing).collect();
        while let Some(Key(key)) = map.next_key()? {
            match self.wanted.iter().position(|name| *name == key) {
                Some(index) => {
                    values[index] = map.next_value_seed(AnyValue {
                        nested: self.nested[index],
                    })?;
                }
                None => {
                    map.next_value::<IgnoredAny>()?;
                }
            }
            if let Some(keys) = &mut self.keys
                && keys.len() < REMEMBERED_KEYS
                && !keys.contains(key.as_ref())
            {
                keys.insert(key.into_owned());
            }
        }
        Ok(values)
    }
}

/// A key, borrowed from the line where it holds no escapes.
#[derive(serde::Deserialize)]
struct Key<'a>(#[serde(borrow)] Cow<'a, str>);

struct AnyValue {
    nested: bool,
}

impl<'de> DeserializeSeed<'de> for AnyValue {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, parser: D) -> Result<Value, D::Error> {
        parser.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for AnyValue {
    type Value = Value;

    fn expecting(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        formatter.write_str("a JSON value")
    }

    fn visit_str<E>(self, text: &str) -> Result<Value, E> {
        Ok(Value::Text(text.to_owned()))
    }

    fn visit_string<E>(self, text: String) -> Result<Value, E> {
        Ok(Value::Text(text))
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Scalar("a truth value", value.to_string()))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(Value::Scalar("a number", value.to_string()))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(Value::Scalar("a number", value.to_string()))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(Value::Scalar("a number", value.to_string()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Value, A::Error> {
        if self.nested {
            return Json::new()
                .visit_seq(list)
                .map(|json| Value::Nested(json.to_string()));
        }
        while list.next_element::<IgnoredAny>()?.is_some() {}
        Ok(Value::Other("a list"))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        if self.nested {
            return Json::new()
                .visit_map(map)
                .map(|json| Value::Nested(json.to_string()));
        }
        while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
        Ok(Value::Other("an object"))
    }
}
