//! JSON of bounded depth and size: a hostile value costs an error, not the machine's memory.

use std::cell::Cell;
use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};

/// Values (numbers, strings, lists, objects, …) that one record's column may hold; serde_json bounds their depth (128).
pub const MAX_VALUES: usize = 200_000;

/// Builds a [`Value`] of at most [`MAX_VALUES`] values.
pub struct Json<'a>(Budget<'a>);

enum Budget<'a> {
    Own(Cell<usize>),
    Shared(&'a Cell<usize>),
}

impl Json<'_> {
    pub fn new() -> Self {
        Self(Budget::Own(Cell::new(MAX_VALUES)))
    }

    /// # Errors
    /// What is wrong with the text.
    pub fn parse(text: &str) -> Result<Value, String> {
        let mut parser = serde_json::Deserializer::from_str(text);
        let value = Self::new().deserialize(&mut parser);
        value
            .and_then(|value| parser.end().map(|()| value))
            .map_err(|error| format!("is not valid JSON: {error}"))
    }

    fn left(&self) -> &Cell<usize> {
        match &self.0 {
            Budget::Own(left) => left,
            Budget::Shared(left) => left,
        }
    }

    fn child(&self) -> Json<'_> {
        Json(Budget::Shared(self.left()))
    }

    fn spend<E: serde::de::Error>(&self) -> Result<(), E> {
        let left = self.left();
        if left.get() == 0 {
            return Err(E::custom(format!(
                "more than {MAX_VALUES} values in one column"
            )));
        }
        left.set(left.get() - 1);
        Ok(())
    }
}

impl<'de> DeserializeSeed<'de> for Json<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, parser: D) -> Result<Value, D::Error> {
        self.spend()?;
        parser.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Json<'_> {
    type Value = Value;

    fn expecting(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        formatter.write_str("a JSON value")
    }

    fn visit_str<E>(self, text: &str) -> Result<Value, E> {
        Ok(Value::String(text.to_owned()))
    }

    fn visit_string<E>(self, text: String) -> Result<Value, E> {
        Ok(Value::String(text))
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(Value::Number(value.into()))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(Value::Number(value.into()))
    }

    fn visit_f64<E: serde::de::Error>(self, value: f64) -> Result<Value, E> {
        let number = Number::from_f64(value).ok_or_else(|| E::custom("a number out of range"))?;
        Ok(Value::Number(number))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Value, A::Error> {
        let mut values = Vec::new();
        while let Some(value) = list.next_element_seed(self.child())? {
            values.push(value);
        }
        Ok(Value::Array(values))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        let mut values = Map::new();
        while let Some(key) = map.next_key::<String>()? {
            self.spend()?;
            values.insert(key, map.next_value_seed(self.child())?);
        }
        Ok(Value::Object(values))
    }
}
