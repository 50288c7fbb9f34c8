//! Conversations as they stand in a column.

use serde_json::Value;

use super::json::Json;

/// Checks a `messages` column: a list of objects, each with the name of its `role`. Gives it as compact JSON, or `None`
/// for a list of none.
///
/// # Errors
/// What is wrong with it, to go behind the column's name.
pub fn messages(text: &str) -> Result<Option<String>, String> {
    let Value::Array(messages) = Json::parse(text)? else {
        return Err("is not a list of messages".to_owned());
    };
    for (index, message) in messages.iter().enumerate() {
        let number = index + 1;
        let Value::Object(message) = message else {
            return Err(format!("has a message {number} that is not an object"));
        };
        match message.get("role") {
            Some(Value::String(role)) if !role.is_empty() => {}
            Some(_) => return Err(format!("has a message {number} whose role is not a name")),
            None => return Err(format!("has a message {number} without a role")),
        }
    }
    let any = !messages.is_empty();
    Ok(any.then(|| Value::Array(messages).to_string()))
}

/// Checks a `tools` column: a list of objects (JSON schemas), in which an empty list stands for none.
///
/// # Errors
/// What is wrong with it, to go behind the column's name.
pub fn tools(text: &str) -> Result<Option<String>, String> {
    match Json::parse(text)? {
        Value::Null => Ok(None),
        Value::Array(tools) if tools.is_empty() => Ok(None),
        Value::Array(tools) if tools.iter().all(Value::is_object) => {
            Ok(Some(Value::Array(tools).to_string()))
        }
        _ => Err("is not a list of tool schemas".to_owned()),
    }
}

/// What is said in a conversation: the text of every message's content, a line each.
pub fn text(messages: &str) -> String {
    let Ok(Value::Array(messages)) = Json::parse(messages) else {
        return String::new();
    };
    let mut text = String::new();
    for message in &messages {
        match message.get("content") {
            Some(Value::String(content)) => add(&mut text, content),
            Some(Value::Array(parts)) => {
                let texts = parts.iter().filter_map(|part| part.get("text")?.as_str());
                texts.for_each(|part| add(&mut text, part));
            }
            _ => {}
        }
        // Calls have arguments instead of a content.
        if let Some(calls) = message.get("tool_calls") {
            add(&mut text, &calls.to_string());
        }
    }
    text
}

fn add(text: &mut String, line: &str) {
    text.push_str(line);
    text.push('\n');
}
