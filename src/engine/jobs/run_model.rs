//! The model of a run: what its settings train, and what is said of it.

use serde_json::{Map, json};

use super::{Names, select};
use crate::adapter::{AdapterConfig, Selector};
use crate::engine::models::{
    Architecture, Init, LoadPlan, Lora, Quantize, Task, Trained, Transformer,
};
use crate::engine::{EngineKind, Method, ModelEvent, TrainConfig, methods};
use crate::error::{Error, Result};

pub(super) fn load(
    config: &TrainConfig,
    architecture: Architecture,
    trained: Trained,
) -> Result<Transformer> {
    let plan = LoadPlan {
        quantize: (config.method == Method::Qlora).then_some(Quantize {
            quant_type: config.quant_type,
            blocksize: config.blocksize,
            double_quant: config.double_quant,
        }),
        positions: config.sequence_length + trained.virtual_tokens(),
        trained,
        seed: config.seed,
        hollow: config.engine != EngineKind::Embedded,
    };
    Transformer::load(&config.model, architecture, &plan)
}

/// What the settings train of the model. A classification head is trained beside adapters.
pub(super) fn trained(
    config: &TrainConfig,
    model: &Architecture,
) -> Result<(Trained, Vec<String>)> {
    match config.method {
        Method::Full => return Ok((Trained::everything(), Vec::new())),
        Method::Freeze => return Ok((last_layers(config, model)?, Vec::new())),
        _ => {}
    }
    if let Some(found) = methods::fresh(config, model, Names::new(model).modules())? {
        return Ok(found);
    }
    let all = || Selector::Pattern("all-linear".to_owned());
    let target = (config.target_modules.as_ref()).map_or_else(all, methods::selector);
    let mut adapter = AdapterConfig::new(target);
    adapter.r = config.r;
    adapter.lora_alpha = config.lora_alpha;
    adapter.lora_dropout = config.lora_dropout;
    adapter.use_rslora = config.use_rslora;
    adapter.rank_pattern = config.rank_pattern.clone().into_iter().collect();
    adapter.alpha_pattern = config.alpha_pattern.clone().into_iter().collect();
    adapter.kept.insert(
        "base_model_name_or_path".to_owned(),
        json!(config.model.display().to_string()),
    );
    let mut whole = Vec::new();
    if model.task() == Task::Classification {
        adapter
            .kept
            .insert("task_type".to_owned(), json!("SEQ_CLS"));
        whole.push(model.names().classifier.to_owned());
    }
    let (resolved, selection) = select(&adapter, model)?;
    let lora = Some(Lora {
        config: Box::new(resolved),
        targets: selection.targets,
        init: Init::Random,
    });
    let trained = Trained {
        whole,
        lora,
        beside: None,
    };
    Ok((trained, selection.warnings))
}

/// The head and the last blocks, with the norm behind them.
fn last_layers(config: &TrainConfig, model: &Architecture) -> Result<Trained> {
    let (names, count) = (model.names(), config.trained_layers);
    let all = model.num_hidden_layers;
    if count > all {
        return Err(Error::argument(format!(
            "trained_layers is {count}, but the model has {all} blocks"
        )));
    }
    let tied = model.task() == Task::Generation && model.tie_word_embeddings;
    if tied && count == 0 {
        return Err(Error::argument(
            "the model's output layer is its embedding, which method freeze leaves frozen: give \
             trained_layers, the number of blocks to train at the end",
        ));
    }
    let mut whole: Vec<String> = (all - count..all).map(|at| names.layer(at)).collect();
    if !tied {
        whole.push(model.output().to_owned());
    }
    if model.task() == Task::Classification {
        whole.extend(names.pooler.map(|pooler| names.outer(pooler)));
    }
    if count > 0 {
        whole.extend(names.norm.map(|norm| names.outer(norm)));
    }
    Ok(Trained {
        whole,
        ..Trained::nothing()
    })
}

pub(super) fn model_event(config: &TrainConfig, model: &Transformer) -> ModelEvent {
    let architecture = &model.architecture;
    let mut details = Map::new();
    if config.method.is_adapter() {
        let names = Names::new(architecture);
        let adapted = model.adapter_modules().len();
        if adapted > 0 {
            details.insert("adapted_modules".to_owned(), json!(adapted));
            details.insert("linear_modules".to_owned(), json!(names.linear.len() - 1));
        }
    }
    if let Some(labels) = architecture.labels() {
        details.insert("labels".to_owned(), json!(labels.names));
        details.insert("new_head".to_owned(), json!(labels.fresh));
    }
    ModelEvent {
        architecture: architecture.trained_class().to_owned(),
        parameters: model.base_parameters(),
        trainable: model.trainable(),
        quantized_bytes: model.quantized_bytes(),
        details,
    }
}
