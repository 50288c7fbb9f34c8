//! What a finished run is judged by beside its held-out part: a test split, what the model forgot of
//! its own domain, and how it treats groups.

use serde::Serialize;

use super::bias::{Bias, BiasPlan, Said};
use super::run_data::data_config;
use crate::data::{BatchSource, Columns, DataConfig, Sequential, Tokenizer, Whole, prepare_whole};
use crate::engine::metrics::{ClassificationMetrics, GenerationMetrics, Interval, ratio_interval};
use crate::engine::{Control, Evaluation, Hooks, Judging, Measures, TrainConfig, evaluate};
use crate::error::{Error, Result};

/// What was found; each part where it was asked for.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Judgement {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub test: Option<Tested>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub forgetting: Option<Forgetting>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bias: Option<Bias>,
}

/// The best weights on the test side, all of which is read.
#[derive(Debug, Clone, Serialize)]
pub struct Tested {
    /// Mean over the tokens (or the labels) predicted, nats.
    pub loss: f64,
    /// Tokens (or labels) predicted.
    pub tokens: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub generation: Option<GenerationMetrics>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub classification: Option<ClassificationMetrics>,
}

/// A language model on text of its own domain, before the first step and with the best weights.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Forgetting {
    pub tokens: usize,
    pub before: GenerationMetrics,
    pub after: GenerationMetrics,
    /// Mean loss after minus mean loss before, nats per token; the interval is paired: over the
    /// differences of the same rows.
    pub change: Interval,
}

/// Measures a run's model before its first step and after its last.
pub(super) struct Judge<'a> {
    config: &'a TrainConfig,
    test: Option<&'a dyn BatchSource>,
    own: Option<&'a dyn BatchSource>,
    own_before: Option<Evaluation>,
    bias: Option<BiasPlan<'a>>,
    bias_before: Option<(Said, Vec<u32>)>,
}

impl<'a> Judge<'a> {
    /// `own` is the text of [`own_text`].
    pub fn new(
        config: &'a TrainConfig,
        test: Option<&'a dyn BatchSource>,
        own: Option<&'a dyn BatchSource>,
    ) -> Self {
        Self {
            config,
            test,
            own,
            own_before: None,
            bias: None,
            bias_before: None,
        }
    }

    pub fn with_bias(self, bias: Option<BiasPlan<'a>>) -> Self {
        Self { bias, ..self }
    }

    /// Takes what is to be compared from the model as it was loaded.
    ///
    /// # Errors
    /// `Run` where a loss is not finite; `Interrupted` when a hook says stop.
    pub fn before(&mut self, model: &dyn Judging, hooks: &mut (dyn Hooks + Send)) -> Result<()> {
        if let Some(own) = self.own {
            self.own_before = Some(read(model, own, self.config.eval_tokens, hooks)?);
        }
        let bias = self.bias.as_ref();
        self.bias_before = bias.map(|bias| bias.ask(model, hooks)).transpose()?;
        Ok(())
    }

    /// Judges the model with its best weights.
    ///
    /// # Errors
    /// As [`Judge::before`]'s.
    pub fn after(self, model: &dyn Judging, hooks: &mut (dyn Hooks + Send)) -> Result<Judgement> {
        let seed = self.config.seed;
        let measured = |found: &Evaluation, source: &dyn BatchSource| {
            found.measures(model.labels(), source.bytes(), seed)
        };
        let test = self.test.map(|source| {
            let found = read(model, source, usize::MAX, hooks)?;
            let Measures {
                generation,
                classification,
            } = measured(&found, source);
            Ok::<_, Error>(Tested {
                loss: found.loss,
                tokens: found.tokens,
                generation,
                classification,
            })
        });
        let test = test.transpose()?;
        let mut forgetting = None;
        if let (Some(source), Some(before)) = (self.own, self.own_before) {
            let after = read(model, source, self.config.eval_tokens, hooks)?;
            let pairs = before.rows.iter().zip(&after.rows);
            let differences = pairs.filter(|(row, _)| row.1 > 0.0);
            let differences: Vec<_> = differences
                .map(|(before, after)| (after.0 - before.0, before.1))
                .collect();
            let (then, now) = (measured(&before, source), measured(&after, source));
            forgetting = then
                .generation
                .zip(now.generation)
                .map(|(before, after)| Forgetting {
                    tokens: differences.iter().map(|row| row.1 as usize).sum(),
                    before,
                    after,
                    // The mean over all tokens; a row's loss is a number of f32.
                    change: Interval {
                        value: after.loss_interval.value - before.loss_interval.value,
                        ..ratio_interval(&differences, seed)
                    },
                });
        }
        let mut bias = None;
        if let (Some(plan), Some((before, truth))) = (self.bias, self.bias_before) {
            let (after, _) = plan.ask(model, hooks)?;
            bias = Some(plan.found(model.labels(), truth, before, after));
        }
        Ok(Judgement {
            test,
            forgetting,
            bias,
        })
    }
}

/// Evaluates a source from its beginning, up to `limit` tokens.
///
/// # Errors
/// As [`Judge::before`]'s.
pub(super) fn read(
    model: &dyn Judging,
    source: &dyn BatchSource,
    limit: usize,
    hooks: &mut (dyn Hooks + Send),
) -> Result<Evaluation> {
    let proceed = || Ok(hooks.poll()? == Control::Continue);
    evaluate(model, source, limit, proceed)?.ok_or(Error::Interrupted)
}

/// The text that forgetting is measured on, where one is given; its warning goes to `warnings`.
///
/// # Errors
/// Files that cannot be read, or without a token to predict.
pub(super) fn own_text(
    config: &TrainConfig,
    tokenizer: &Tokenizer,
    warnings: &mut Vec<String>,
) -> Result<Option<Whole>> {
    if config.forgetting.is_empty() {
        return Ok(None);
    }
    let data = DataConfig {
        data: config.forgetting.clone(),
        columns: Columns::default(),
        ..data_config(config)
    };
    let whole = prepare_whole(&data, tokenizer)?;
    let said = whole.warning.as_ref();
    warnings.extend(said.map(|warning| format!("forgetting: {warning}")));
    Ok(Some(whole))
}

/// As batches, in the text's order.
///
/// # Errors
/// `Argument` for a batch size of 0.
pub(super) fn own_batches<'a>(
    config: &TrainConfig,
    own: Option<&'a Whole>,
) -> Result<Option<Sequential<'a>>> {
    let source = own.map(|own| {
        let source = Sequential::new(&own.packed, config.batch_size)?;
        Ok(source.spelling(own.bytes))
    });
    source.transpose()
}

/// # Errors
/// `Argument`: a classifier has no loss on running text.
pub(super) fn refuse_forgetting(config: &TrainConfig) -> Result<()> {
    if config.forgetting.is_empty() {
        return Ok(());
    }
    Err(Error::argument(
        "forgetting is the loss of a language model on running text, which a classifier does not \
         have: leave it out, or give task generation",
    ))
}
