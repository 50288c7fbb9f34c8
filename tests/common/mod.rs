//! What several test files need.

use ferrotune::error::Result;

/// The result is an error whose message has every part.
#[track_caller]
pub fn assert_says<T>(result: Result<T>, parts: &[&str]) {
    let text = result.err().expect("an error").to_string();
    for part in parts {
        assert!(text.contains(part), "'{part}' is not in: {text}");
    }
}
