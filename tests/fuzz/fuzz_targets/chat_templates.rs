//! Any template over a conversation: text, or one reason. What a NUL separates are the template and the messages.

#![no_main]

use ferrotune::data::{ChatTemplate, Conversation};
use libfuzzer_sys::fuzz_target;

const MESSAGES: &str = r#"[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes", "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1.5}}}]}]"#;
const TOOLS: &str = r#"[{"type": "function", "function": {"name": "f", "parameters": {}}}]"#;

fuzz_target!(|input: &str| {
    let (source, messages) = input.split_once('\0').unwrap_or((input, MESSAGES));
    let Ok(template) = ChatTemplate::new(source, None, serde_json::Map::new()) else {
        return;
    };
    let Ok(conversation) = Conversation::parse(messages, Some(TOOLS)) else {
        return;
    };
    let _ = template.render(&conversation, true);
    if let Ok((text, spans)) = template.spans(&conversation) {
        let length = text.chars().count();
        assert!(spans.iter().all(|span| span.start <= span.end && span.end <= length));
    }
});
