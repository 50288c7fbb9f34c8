//! Chat templates, and conversations as tokens.

use std::path::PathBuf;

use pyo3::prelude::*;

use crate::data::{self, Conversation};
use crate::error::{Error, Result};

fn conversation(
    messages: &str,
    tools: Option<&str>,
    variables: Option<&str>,
) -> Result<Conversation> {
    let mut conversation = Conversation::parse(messages, tools).map_err(Error::argument_of)?;
    if let Some(variables) = variables {
        conversation.variables = serde_json::from_str(variables)
            .map_err(|error| Error::argument(format!("variables: {error}")))?;
    }
    Ok(conversation)
}

/// A Jinja chat template, rendered as transformers renders it. Messages, tools and variables are JSON.
#[pyclass(frozen, name = "_ChatTemplate")]
pub struct ChatTemplate(data::ChatTemplate);

#[pymethods]
impl ChatTemplate {
    #[new]
    #[pyo3(signature = (source, special_tokens, tool_use=None))]
    fn new(source: &str, special_tokens: &str, tool_use: Option<&str>) -> Result<Self> {
        let tokens = serde_json::from_str(special_tokens)
            .map_err(|error| Error::argument(format!("special_tokens: {error}")))?;
        data::ChatTemplate::new(source, tool_use, tokens).map(Self)
    }

    #[pyo3(signature = (messages, tools=None, add_generation_prompt=false, variables=None))]
    fn render(
        &self,
        py: Python<'_>,
        messages: &str,
        tools: Option<&str>,
        add_generation_prompt: bool,
        variables: Option<&str>,
    ) -> Result<String> {
        let conversation = conversation(messages, tools, variables)?;
        py.detach(|| self.0.render(&conversation, add_generation_prompt))
            .map_err(Error::argument_of)
    }

    /// The text, and the assistant's parts as pairs of character indices.
    #[pyo3(signature = (messages, tools=None, variables=None))]
    fn spans(
        &self,
        py: Python<'_>,
        messages: &str,
        tools: Option<&str>,
        variables: Option<&str>,
    ) -> Result<(String, Vec<(usize, usize)>)> {
        let conversation = conversation(messages, tools, variables)?;
        let (text, spans) = py
            .detach(|| self.0.spans(&conversation))
            .map_err(Error::argument_of)?;
        Ok((
            text,
            spans
                .into_iter()
                .map(|span| (span.start, span.end))
                .collect(),
        ))
    }
}

/// Token ids, and the trained ones as pairs of indices.
type Encoded = (Vec<u32>, Vec<(u32, u32)>);

/// A folder's tokenizer with its chat template.
#[pyclass(frozen, name = "_ChatTokenizer")]
pub struct ChatTokenizer(data::Tokenizer);

#[pymethods]
impl ChatTokenizer {
    #[new]
    fn new(folder: PathBuf) -> Result<Self> {
        data::Tokenizer::from_folder(&folder, None, None, None).map(Self)
    }

    /// Token ids, and the trained ones as pairs of indices.
    #[pyo3(signature = (messages, tools=None, variables=None))]
    fn encode(
        &self,
        py: Python<'_>,
        messages: &str,
        tools: Option<&str>,
        variables: Option<&str>,
    ) -> Result<Encoded> {
        let conversation = conversation(messages, tools, variables)?;
        let example = py
            .detach(|| self.0.chat(&conversation))
            .map_err(Error::argument_of)?;
        let trained = example.trained().iter();
        Ok((
            example.ids().to_vec(),
            trained.map(|range| (range.start, range.end)).collect(),
        ))
    }
}
