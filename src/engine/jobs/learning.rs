//! Who computes a run: the engine itself, or a maker of learners that was handed in.

use serde::Serialize;
use serde_json::{Map, Value, json};

use crate::engine::models::{Task, Transformer, linear_modules};
use crate::engine::{EngineKind, Learner, Local, Model, ModelEvent, Parameter, TrainConfig};
use crate::error::{Error, Result};

/// Makes learners for models whose own frozen weights were left in their folder.
pub trait MakesLearners: Sync {
    /// A learner whose weights are those of `model`'s parameters; what it saves is
    /// [`crate::engine::Model::save`]'s of these. `outline` says the rest.
    ///
    /// # Errors
    /// Its own, before anything is written.
    fn learner<'a>(
        &'a self,
        model: &'a Transformer,
        outline: &Outline,
    ) -> Result<Box<dyn Learner + 'a>>;
}

/// Who computes a run, and why.
#[derive(Clone, Copy, Default)]
pub struct Engine<'a> {
    pub why: Option<&'a str>,
    /// Of engine torch.
    pub maker: Option<&'a dyn MakesLearners>,
}

/// What a learner of another library needs to know of a run's model beside the run's settings.
#[derive(Debug, Serialize)]
pub struct Outline {
    /// `generation` or `classification`.
    pub task: &'static str,
    /// The class of the trained model in transformers.
    pub class: String,
    /// Names of a classifier's labels.
    pub labels: Vec<String>,
    /// The content of the adapter's adapter_config.json; none where weights of the model are trained.
    pub adapter: Option<Map<String, Value>>,
    /// The linear layers that 4-bit methods quantise.
    pub linear_modules: Vec<String>,
    pub virtual_tokens: usize,
    pub parameters: Vec<Flat>,
}

/// A flat parameter.
#[derive(Debug, Serialize)]
pub struct Flat {
    pub elements: usize,
    pub segments: Vec<Part>,
}

/// A named tensor in a flat parameter.
#[derive(Debug, Serialize)]
pub struct Part {
    pub name: String,
    pub offset: usize,
    pub shape: Vec<usize>,
    pub decay: bool,
}

impl Outline {
    fn new(model: &Transformer) -> Self {
        let architecture = &model.architecture;
        let mut linear_modules = linear_modules(architecture);
        linear_modules.retain(|module| module != architecture.output());
        let parts = |parameter: &Parameter| {
            let segments = parameter.segments.iter();
            segments
                .map(|segment| Part {
                    name: segment.name.clone(),
                    offset: segment.offset,
                    shape: segment.shape.clone(),
                    decay: segment.decay,
                })
                .collect()
        };
        let parameters = model.parameters().iter();
        Self {
            task: match architecture.task() {
                Task::Generation => "generation",
                Task::Classification => "classification",
            },
            class: architecture.trained_class().to_owned(),
            labels: architecture
                .labels()
                .map_or_else(Vec::new, |labels| labels.names.clone()),
            adapter: model.adapter_json(),
            linear_modules,
            virtual_tokens: model.virtual_tokens(),
            parameters: parameters
                .map(|parameter| Flat {
                    elements: parameter.var.elem_count(),
                    segments: parts(parameter),
                })
                .collect(),
        }
    }
}

impl<'a> Engine<'a> {
    /// # Errors
    /// `Argument` where the settings name an engine that is not at hand.
    pub fn check(&self, config: &TrainConfig) -> Result<()> {
        match (config.engine, self.maker) {
            (EngineKind::Torch, None) => Err(Error::argument(
                "engine torch runs from Python, with PyTorch; give engine embedded",
            )),
            (EngineKind::Embedded, Some(_)) => {
                Err(Error::argument("engine embedded takes no other learner"))
            }
            _ => Ok(()),
        }
    }

    pub(super) fn learner(
        &self,
        config: &TrainConfig,
        model: &'a Transformer,
    ) -> Result<Box<dyn Learner + 'a>> {
        match self.maker {
            Some(maker) => maker.learner(model, &Outline::new(model)),
            None => Ok(Box::new(Local::new(config, model)?)),
        }
    }

    /// Says in `event` who computes.
    pub(super) fn describe(
        &self,
        config: &TrainConfig,
        learner: &dyn Learner,
        event: &mut ModelEvent,
    ) -> Result<()> {
        let mut facts = Map::from_iter([("name".to_owned(), json!(config.engine))]);
        facts.extend(self.why.map(|why| ("why".to_owned(), json!(why))));
        event
            .details
            .insert("engine".to_owned(), Value::Object(facts));
        learner.describe(event)
    }
}
