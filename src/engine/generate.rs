//! Text, one sampled token after another.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use serde::{Deserialize, Serialize};

use crate::data::Tokenizer;
use crate::engine::models::Decoder;
use crate::error::{Error, Result};

/// How the next token is chosen.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Sampling {
    /// Tokens to generate at most.
    pub max_tokens: usize,
    /// Divides the logits; 0 takes the likeliest token.
    pub temperature: f32,
    /// Only so many likeliest tokens; null for all.
    pub top_k: Option<usize>,
    /// Only the likeliest tokens that together reach this probability; null for all.
    pub top_p: Option<f32>,
    pub seed: u64,
    /// Texts that end the generation and are not part of it.
    pub stop: Vec<String>,
}

impl Sampling {
    /// # Errors
    /// `Argument`, naming the setting, its value and what is allowed.
    pub fn validate(&self) -> Result<()> {
        if !(self.temperature >= 0.0 && self.temperature.is_finite()) {
            return Err(Error::argument(format!(
                "temperature must be 0 or a positive number, not {}",
                self.temperature
            )));
        }
        if self.top_k == Some(0) {
            return Err(Error::argument("top_k must be at least 1, not 0"));
        }
        if let Some(p) = self.top_p.filter(|&p| !(p > 0.0 && p <= 1.0)) {
            return Err(Error::argument(format!("top_p must be in (0, 1], not {p}")));
        }
        if self.stop.iter().any(String::is_empty) {
            return Err(Error::argument("a stop text must not be empty"));
        }
        Ok(())
    }
}

/// What was generated.
#[derive(Debug, Clone, PartialEq)]
pub struct Generated {
    /// Without the prompt and without what stopped it.
    pub text: String,
    pub tokens: usize,
}

/// Continues `prompt`, telling `on_text` each piece of finished text; it answers whether to go on.
///
/// The prompt's last tokens are kept if it is longer than the model's positions; a sequence that
/// fills them ends there.
///
/// # Errors
/// `Argument` for settings out of range or a prompt without a token.
pub fn generate(
    mut decoder: Decoder,
    tokenizer: &Tokenizer,
    eos: &[u32],
    prompt: &str,
    sampling: &Sampling,
    mut on_text: impl FnMut(&str) -> Result<bool>,
) -> Result<Generated> {
    sampling.validate()?;
    let ids = tokenizer.encode_prompt(prompt)?;
    if ids.is_empty() {
        return Err(Error::argument(
            "the prompt has no token, and the model has no start token to begin with",
        ));
    }
    let left = decoder.capacity().saturating_sub(decoder.length());
    let room = left.saturating_sub(1).max(1);
    let ids = &ids[ids.len().saturating_sub(room)..];
    let mut random = ChaCha8Rng::seed_from_u64(sampling.seed);
    // The prompt is decoded along, so that a first token spells its leading space.
    let shown = tokenizer.decode(ids)?.len();
    let mut all = ids.to_vec();
    let mut emitted = 0;
    let mut text = String::new();
    let mut tokens = 0;
    let mut logits = decoder.step(ids)?;
    while tokens < sampling.max_tokens {
        let next = choose(&mut logits, sampling, &mut random)?;
        if eos.contains(&next) {
            break;
        }
        tokens += 1;
        all.push(next);
        let spelled = tokenizer.decode(&all)?;
        spelled
            .get(shown..)
            .unwrap_or_default()
            .clone_into(&mut text);
        if let Some(end) = sampling
            .stop
            .iter()
            .filter_map(|stop| text.find(stop.as_str()))
            .min()
        {
            text.truncate(end);
            break;
        }
        // A character whose bytes are not all there yet decodes as U+FFFD: wait for the rest.
        if !text.ends_with('\u{FFFD}') {
            let held = longest_tail(&text, &sampling.stop);
            let ready = text.len() - held;
            if ready > emitted {
                let piece = &text[emitted..ready];
                emitted = ready;
                if !on_text(piece)? {
                    break;
                }
            }
        }
        if decoder.length() == decoder.capacity() {
            break;
        }
        logits = decoder.step(&[next])?;
    }
    if text.len() > emitted {
        on_text(&text[emitted..])?;
    }
    Ok(Generated { text, tokens })
}

/// Length of the longest end of `text` that may be the beginning of a stop text.
fn longest_tail(text: &str, stop: &[String]) -> usize {
    let tail = |stop: &String| {
        (1..stop.len())
            .rev()
            .find(|&length| stop.is_char_boundary(length) && text.ends_with(&stop[..length]))
            .unwrap_or(0)
    };
    stop.iter().map(tail).max().unwrap_or(0)
}

fn choose(logits: &mut [f32], sampling: &Sampling, random: &mut ChaCha8Rng) -> Result<u32> {
    if logits.iter().any(|value| value.is_nan()) {
        return Err(Error::run("the model's logits are not numbers"));
    }
    let mut order: Vec<u32> = (0..logits.len() as u32).collect();
    // Equal logits keep the order of their ids, so a seed gives one text.
    order.sort_by(|&a, &b| logits[b as usize].total_cmp(&logits[a as usize]));
    if sampling.temperature == 0.0 {
        return Ok(order[0]);
    }
    if let Some(k) = sampling.top_k {
        order.truncate(k);
    }
    let top = f64::from(logits[order[0] as usize]);
    let temperature = f64::from(sampling.temperature);
    let mut weights: Vec<f64> = order
        .iter()
        .map(|&id| ((f64::from(logits[id as usize]) - top) / temperature).exp())
        .collect();
    if let Some(p) = sampling.top_p {
        let total: f64 = weights.iter().sum();
        let mut reached = 0.0;
        let kept = weights
            .iter()
            .position(|weight| {
                reached += weight;
                reached >= f64::from(p) * total
            })
            .map_or(weights.len(), |at| at + 1);
        weights.truncate(kept);
    }
    let total: f64 = weights.iter().sum();
    let unit = (random.next_u64() >> 11) as f64 / (1u64 << 53) as f64;
    let mut left = unit * total;
    for (weight, &id) in weights.iter().zip(&order) {
        left -= weight;
        if left < 0.0 {
            return Ok(id);
        }
    }
    Ok(order[weights.len() - 1])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sampling(temperature: f32, top_k: Option<usize>, top_p: Option<f32>) -> Sampling {
        Sampling {
            max_tokens: 1,
            temperature,
            top_k,
            top_p,
            seed: 0,
            stop: vec![],
        }
    }

    fn frequencies(how: &Sampling) -> [f64; 4] {
        let mut random = ChaCha8Rng::seed_from_u64(1);
        let mut counts = [0.0; 4];
        for _ in 0..20_000 {
            let mut logits = [0.0, 1.0, 2.0, -1.0];
            counts[choose(&mut logits, how, &mut random).unwrap() as usize] += 1.0 / 20_000.0;
        }
        counts
    }

    #[test]
    fn sampling_follows_the_softmax() {
        let expected: Vec<f64> = [0.0f64, 1.0, 2.0, -1.0]
            .iter()
            .map(|v| (v / 0.7).exp())
            .collect();
        let total: f64 = expected.iter().sum();
        for (got, expected) in frequencies(&sampling(0.7, None, None)).iter().zip(expected) {
            assert!((got - expected / total).abs() < 0.015);
        }
    }

    #[test]
    fn greedy_top_k_and_top_p() {
        assert_eq!(frequencies(&sampling(0.0, None, None))[2].round(), 1.0);
        let two = frequencies(&sampling(1.0, Some(2), None));
        assert_eq!([two[0], two[3]], [0.0, 0.0]);
        assert!(two[1] > 0.2 && two[2] > 0.6);
        // e² / (e² + e + 1 + 1/e) = 0.64: one token reaches 0.6, two are needed for 0.7.
        assert!((frequencies(&sampling(1.0, None, Some(0.6)))[2] - 1.0).abs() < 1e-9);
        let both = frequencies(&sampling(1.0, None, Some(0.7)));
        assert!(both[1] > 0.2 && both[0] == 0.0);
    }

    #[test]
    fn a_beginning_of_a_stop_text_is_held_back() {
        let stop = vec!["###".to_owned(), "end".to_owned()];
        assert_eq!(longest_tail("a ##", &stop), 2);
        assert_eq!(longest_tail("the en", &stop), 2);
        assert_eq!(longest_tail("the end.", &stop), 0);
    }

    #[test]
    fn settings_out_of_range() {
        for bad in [
            sampling(-1.0, None, None),
            sampling(f32::NAN, None, None),
            sampling(1.0, Some(0), None),
            sampling(1.0, None, Some(0.0)),
            sampling(1.0, None, Some(1.5)),
        ] {
            assert!(matches!(bad.validate(), Err(Error::Argument(_))), "{bad:?}");
        }
    }
}
