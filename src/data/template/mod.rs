//! Chat templates: a tokenizer's own Jinja template turns messages into text, as transformers renders it.
//!
//! The assistant's part of the text, which is what a model is trained on, comes from the template's
//! `{% generation %}` markers, or where it has none from rendering the conversation up to each turn.

mod budget;
mod environment;
mod filters;
mod folder;
mod python;
mod source;
mod stack;

use std::ops::Range;

use minijinja::{Environment, Value as JinjaValue, context};
use serde_json::{Map, Value};

use super::guard::guarded;
use super::json::Json;
use super::record::Reason;
use crate::error::{Error, Result};
use budget::MAX_TEXT_BYTES;
pub(super) use stack::deep;

/// Names under which a message's reasoning is found, the first being what templates read.
const REASONING: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];
/// Characters that no text has (Unicode's noncharacters), to mark the assistant's text with.
const MARKS: std::ops::RangeInclusive<char> = '\u{fdd0}'..='\u{fdef}';

/// A conversation, ready to be rendered.
#[derive(Debug, Clone, PartialEq)]
pub struct Conversation {
    messages: Vec<Value>,
    tools: Value,
    /// Further variables of the template, such as `enable_thinking`.
    pub variables: Map<String, Value>,
}

impl Conversation {
    /// From JSON: a list of messages, and a list of tool schemas. As in transformers, keys whose value is null are left
    /// out, and reasoning is found under any of its names.
    ///
    /// # Errors
    /// [`Reason::Malformed`].
    pub fn parse(messages: &str, tools: Option<&str>) -> std::result::Result<Self, Reason> {
        let malformed = |column: &str, problem: String| Reason::Malformed {
            column: column.to_owned(),
            problem,
        };
        let parsed = Json::parse(messages).map_err(|problem| malformed("messages", problem))?;
        let Value::Array(messages) = parsed else {
            return Err(malformed(
                "messages",
                "is not a list of messages".to_owned(),
            ));
        };
        let tools = tools
            .map_or(Ok(Value::Null), Json::parse)
            .map_err(|problem| malformed("tools", problem))?;
        let messages = messages.into_iter().map(normalised).collect();
        Ok(Self {
            messages,
            tools,
            variables: Map::new(),
        })
    }

    fn is_assistant(&self, index: usize) -> bool {
        self.messages[index].get("role").and_then(Value::as_str) == Some("assistant")
    }

    fn contains(&self, mark: char) -> bool {
        fn inside(value: &Value, mark: char) -> bool {
            match value {
                Value::String(text) => text.contains(mark),
                Value::Array(values) => values.iter().any(|value| inside(value, mark)),
                Value::Object(values) => values
                    .iter()
                    .any(|(key, value)| key.contains(mark) || inside(value, mark)),
                _ => false,
            }
        }
        self.messages.iter().any(|message| inside(message, mark))
            || inside(&self.tools, mark)
            || self.variables.values().any(|value| inside(value, mark))
    }
}

fn normalised(message: Value) -> Value {
    let Value::Object(mut message) = message else {
        return message;
    };
    message.retain(|_, value| !value.is_null());
    let reasoning = REASONING
        .iter()
        .find_map(|name| message.get(*name))
        .cloned();
    if let Some(reasoning) = reasoning {
        if !message.contains_key("thinking") {
            message.shift_insert(0, "thinking".to_owned(), reasoning.clone());
        }
        message.insert("reasoning_content".to_owned(), reasoning);
    }
    Value::Object(message)
}

/// A compiled chat template with the tokenizer's special tokens.
pub struct ChatTemplate {
    environment: Environment<'static>,
    /// Whether the template marks the assistant's text; of both templates.
    marked: [bool; 2],
    /// By name, as the template knows them: `bos_token`, ….
    special_tokens: Map<String, Value>,
}

impl std::fmt::Debug for ChatTemplate {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("ChatTemplate")
            .field("special_tokens", &self.special_tokens)
            .finish_non_exhaustive()
    }
}

/// Names of the templates in the environment: the one for all, and the one for conversations with tools.
const NAMES: [&str; 2] = ["default", "tool_use"];

impl ChatTemplate {
    /// Compiles a template; `tool_use` is used for conversations with tools, where there is one.
    ///
    /// # Errors
    /// [`Error::Argument`] with the line of the template that cannot be read.
    pub fn new(
        source: &str,
        tool_use: Option<&str>,
        special_tokens: Map<String, Value>,
    ) -> Result<Self> {
        let sources = [source, tool_use.unwrap_or(source)];
        let unreadable =
            |problem: &str| Error::argument(format!("the chat template cannot be read: {problem}"));
        let environment = deep(|| guarded(|| compile(sources)))
            .map_err(|error| unreadable(&format!("no thread can be started for it: {error}")))?
            .map_err(|problem| unreadable(&problem))?
            .map_err(|error| unreadable(&describe(&error)))?;
        Ok(Self {
            environment,
            marked: sources.map(environment::has_generation_tags),
            special_tokens,
        })
    }

    /// The text of a conversation. With `add_generation_prompt` it ends with what comes before an assistant's turn.
    ///
    /// # Errors
    /// [`Reason::Template`]: what the template refuses, or takes too much time or room for.
    pub fn render(
        &self,
        conversation: &Conversation,
        add_generation_prompt: bool,
    ) -> std::result::Result<String, Reason> {
        self.render_part(
            conversation,
            conversation.messages.len(),
            add_generation_prompt,
            None,
        )
    }

    /// Whether the template for this conversation marks the assistant's text.
    pub fn is_marked(&self, conversation: &Conversation) -> bool {
        self.marked[usize::from(!conversation.tools.is_null())]
    }

    /// The text, and the assistant's parts of it as ranges of characters.
    ///
    /// # Errors
    /// As [`ChatTemplate::render`]'s; [`Reason::NoAssistant`]; and [`Reason::Template`] where the template has no
    /// markers and renders a turn otherwise once others follow it.
    pub fn spans(
        &self,
        conversation: &Conversation,
    ) -> std::result::Result<(String, Vec<Range<usize>>), Reason> {
        let count = conversation.messages.len();
        if !(0..count).any(|index| conversation.is_assistant(index)) {
            return Err(Reason::NoAssistant);
        }
        if !self.is_marked(conversation) {
            return self.spans_by_prefix(conversation);
        }
        let mut free = MARKS.filter(|mark| !conversation.contains(*mark));
        let (Some(start), Some(end)) = (free.next(), free.next()) else {
            return Err(Reason::Template(
                "the messages hold every noncharacter of Unicode".to_owned(),
            ));
        };
        let marked = self.render_part(conversation, count, false, Some((start, end)))?;
        let mut text = String::with_capacity(marked.len());
        let mut spans = Vec::new();
        let (mut position, mut begin) = (0, None);
        for character in marked.chars() {
            if character == start {
                begin = Some(position);
            } else if character == end {
                spans.extend(begin.take().map(|begin| begin..position));
            } else {
                text.push(character);
                position += 1;
            }
        }
        Ok((text, spans))
    }

    /// Of each assistant's turn, what its text adds to that of the turns before it and the generation prompt.
    fn spans_by_prefix(
        &self,
        conversation: &Conversation,
    ) -> std::result::Result<(String, Vec<Range<usize>>), Reason> {
        let count = conversation.messages.len();
        let text = self.render_part(conversation, count, false, None)?;
        let mut spans = Vec::new();
        for index in (0..count).filter(|index| conversation.is_assistant(*index)) {
            let prefix = |count: usize, prompt: bool| {
                let part = self.render_part(conversation, count, prompt, None)?;
                if text.starts_with(&part) {
                    return Ok(part.len());
                }
                Err(Reason::Template(format!(
                    "it has no {{% generation %}} markers, and renders turn {} otherwise once others follow it, so that what is the assistant's cannot be told; give a template with markers",
                    index + 1
                )))
            };
            let start = prefix(index, true)?;
            let end = prefix(index + 1, false)?;
            spans.push(start..end);
        }
        // Bytes to characters, all in one pass.
        let mut characters = 0;
        let mut byte = 0;
        let spans = spans
            .into_iter()
            .map(|span: Range<usize>| {
                let mut position = |to: usize| {
                    characters += text[byte..to.max(byte)].chars().count();
                    byte = to.max(byte);
                    characters
                };
                let start = position(span.start);
                start..position(span.end)
            })
            .collect();
        Ok((text, spans))
    }

    fn render_part(
        &self,
        conversation: &Conversation,
        count: usize,
        add_generation_prompt: bool,
        marks: Option<(char, char)>,
    ) -> std::result::Result<String, Reason> {
        let render = || {
            guarded(|| self.render_here(conversation, count, add_generation_prompt, marks))
                .unwrap_or_else(|problem| Err(Reason::Template(problem)))
        };
        deep(render).unwrap_or_else(|error| {
            let problem = format!("no thread can be started for it: {error}");
            Err(Reason::Template(problem))
        })
    }

    fn render_here(
        &self,
        conversation: &Conversation,
        count: usize,
        add_generation_prompt: bool,
        marks: Option<(char, char)>,
    ) -> std::result::Result<String, Reason> {
        let fail = |error: &minijinja::Error| Reason::Template(describe(error));
        let template = self
            .environment
            .get_template(NAMES[usize::from(!conversation.tools.is_null())])
            .map_err(|error| fail(&error))?;
        let mut variables = self.special_tokens.clone();
        variables.extend(conversation.variables.clone());
        let variables = JinjaValue::from_serialize(&variables);
        let (start, end) = marks.map_or((None, None), |(start, end)| (Some(start), Some(end)));
        let variables = context! {
            messages => &conversation.messages[..count],
            tools => &conversation.tools,
            documents => (),
            add_generation_prompt,
            ferrotune_generation_start => start,
            ferrotune_generation_end => end,
            ..variables
        };
        budget::begin();
        let mut text = environment::Bounded::default();
        let rendered = template.render_captured_to(variables, &mut text);
        if text.full {
            return Err(Reason::Template(format!(
                "it writes more than {} MiB",
                MAX_TEXT_BYTES >> 20
            )));
        }
        rendered.map_err(|error| fail(&error))?;
        String::from_utf8(text.bytes).map_err(|error| Reason::Template(error.to_string()))
    }
}

/// The templates of [`NAMES`], as they are counted.
fn compile(sources: [&str; 2]) -> std::result::Result<Environment<'static>, minijinja::Error> {
    let mut environment = environment::new();
    let mut steps = environment::MAX_STEPS;
    for (name, source) in NAMES.iter().zip(sources) {
        let counted = source::counted(&environment::without_generation_tags(source), steps)?;
        steps = counted.steps;
        environment.add_template_owned(*name, counted.source)?;
    }
    environment.set_fuel(Some(steps));
    Ok(environment)
}

/// What happened and in which line; the error's causes too, one behind another.
fn describe(error: &minijinja::Error) -> String {
    let mut text = match error.kind() {
        minijinja::ErrorKind::OutOfFuel => {
            "it does not come to an end (too many steps of the template)".to_owned()
        }
        _ => error
            .detail()
            .map_or_else(|| error.kind().to_string(), str::to_owned),
    };
    if let Some(line) = error.line() {
        text = format!("line {line}: {text}");
    }
    text
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::{ChatTemplate, Conversation, Map, budget, deep};

    /// Each of these would take minutes or hours by its steps alone, and makes nothing that is counted.
    #[test]
    fn long_texts_walked_through_at_every_step() {
        let conversation = Conversation::parse("[]", None).unwrap();
        let uses = [
            "s == t",
            "1 < 2 <= s.count('y') < 3",
            "s in t or t not in s",
            "s is eq(t)",
            "s is startingwith(t)",
            "s is in t",
            "s == (t if true else z)",
            "s == (t or z)",
            "s == (z or t)",
            "s | length == 1",
            "s.find('y')",
            "s[1:][0] is defined",
            "s[:][0] is defined",
            "s[:].y is defined",
            "s[::-1][0] is defined",
            "(s)[:] [0] is defined",
        ];
        deep(|| {
            budget::limit_time(Duration::from_millis(20));
            for test in uses {
                let loops = "{% for a in range(900) %}".repeat(2);
                let source = format!(
                    "{{% set s = 'x' * 30000000 %}}{{% set t = 'x' * 29999999 + 'z' %}}{loops}{{% if {test} %}}{{% endif %}}{{% endfor %}}{{% endfor %}}"
                );
                let template = ChatTemplate::new(&source, None, Map::new()).unwrap();
                let begin = Instant::now();
                let error = template.render(&conversation, false).unwrap_err();
                let error = error.to_string();
                assert!(error.contains("more than 20ms for one conversation"), "{test}: {error}");
                assert!(begin.elapsed() < Duration::from_secs(60), "{test}");
            }
        })
        .unwrap();
    }
}
