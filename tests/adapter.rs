//! Adapter configurations and target matching, the latter against a plain reference.

#![allow(clippy::unwrap_used)]

mod common;

use common::assert_says;
use ferrotune::adapter::{AdapterConfig, Modules, Rules, Selector, select};
use ferrotune::error::{Error, Result};
use proptest::prelude::*;
use serde_json::{Map, Value, json};

fn config(value: Value) -> Result<AdapterConfig> {
    let Value::Object(mut map) = value else {
        panic!("an object")
    };
    map.entry("peft_type").or_insert(json!("LORA"));
    AdapterConfig::from_json(&map).map(|(config, _)| config)
}

fn llama(layers: usize) -> Vec<String> {
    let mut names = Vec::new();
    for layer in 0..layers {
        for part in [
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "self_attn.o_proj",
        ] {
            names.push(format!("model.layers.{layer}.{part}"));
        }
        for part in ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"] {
            names.push(format!("model.layers.{layer}.{part}"));
        }
    }
    names.push("lm_head".to_owned());
    names
}

fn chosen(config: &AdapterConfig, linear: &[String]) -> Result<Vec<String>> {
    let modules = Modules {
        linear,
        other: &[],
        output: Some("lm_head"),
    };
    Ok(select(config, modules)?
        .targets
        .into_iter()
        .map(|target| target.module)
        .collect())
}

#[test]
fn target_modules_as_list_suffix_pattern_and_all_linear() {
    let names = llama(3);
    let count = |value: Value| chosen(&config(value).unwrap(), &names).unwrap().len();
    assert_eq!(count(json!({"target_modules": ["q_proj", "v_proj"]})), 6);
    assert_eq!(count(json!({"target_modules": ["self_attn.q_proj"]})), 3);
    assert_eq!(
        count(json!({"target_modules": ["model.layers.1.mlp.up_proj", "lm_head"]})),
        2
    );
    assert_eq!(
        count(json!({"target_modules": r".*\.[02]\.self_attn\.(q|k)_proj"})),
        4
    );
    assert_eq!(count(json!({"target_modules": r"^(?!.*mlp).*_proj$"})), 12);
    assert_eq!(count(json!({"target_modules": "all-linear"})), 21);
    assert_eq!(
        count(json!({"target_modules": "All-Linear", "exclude_modules": ["down_proj"]})),
        18
    );
    assert_eq!(
        count(json!({"target_modules": "all-linear", "exclude_modules": ".*mlp.*"})),
        12
    );
    assert_eq!(
        count(json!({"target_modules": ["q_proj"], "layers_to_transform": [0, 2]})),
        2
    );
    assert_eq!(
        count(
            json!({"target_modules": ["q_proj"], "layers_to_transform": 1, "layers_pattern": "layers"})
        ),
        1
    );
    assert_eq!(
        count(json!({"target_modules": ["q_proj"], "layers_to_transform": []})),
        3
    );
    // A module named in full is chosen whatever its layer.
    assert_eq!(
        count(
            json!({"target_modules": ["model.layers.2.self_attn.q_proj"], "layers_to_transform": [0]})
        ),
        1
    );
}

#[test]
fn nothing_chosen_lists_the_kinds_of_names() {
    let names = llama(2);
    let all = "q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj, lm_head";
    let none = |value: Value| chosen(&config(value).unwrap(), &names);
    assert_says(
        none(json!({"target_modules": ["query"]})),
        &["[\"query\"]", "15 linear layers", all],
    );
    // Not a substring and not a prefix: the whole last parts.
    assert_says(none(json!({"target_modules": ["proj"]})), &[all]);
    assert_says(
        none(json!({"target_modules": "q_proj"})),
        &["'q_proj'", all],
    );
    assert_says(none(json!({"target_modules": []})), &[all]);
    assert_says(
        none(json!({"target_modules": ["q_proj"], "layers_to_transform": [7]})),
        &["layers_to_transform=[7]"],
    );
    assert_says(
        none(json!({"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]})),
        &["exclude_modules=[\"q_proj\"]"],
    );
    assert_says(
        chosen(&config(json!({"target_modules": ["a"]})).unwrap(), &[]),
        &["no linear layers"],
    );
}

#[test]
fn modules_that_are_not_linear_are_refused() {
    let linear = llama(1);
    let other = ["model.embed_tokens".to_owned(), "model.norm".to_owned()];
    let modules = Modules {
        linear: &linear,
        other: &other,
        output: Some("lm_head"),
    };
    let refused = |value: Value| select(&config(value).unwrap(), modules);
    assert_says(
        refused(json!({"target_modules": ["q_proj", "embed_tokens"]})),
        &["model.embed_tokens", "not a linear layer"],
    );
    assert_says(
        refused(json!({"target_modules": ["self_attn"]})),
        &["model.layers.0.self_attn"],
    );
    assert_says(
        refused(json!({"target_modules": r".*self_attn.*"})),
        &["not a linear layer"],
    );
    assert!(refused(json!({"target_modules": "all-linear"})).is_ok());
}

#[test]
fn parts_without_effect_are_reported() {
    let linear = llama(1);
    let modules = Modules {
        linear: &linear,
        other: &[],
        output: None,
    };
    let config = config(json!({
        "target_modules": ["q_proj", "query"], "exclude_modules": ["w1"], "rank_pattern": {"k_proj": 4, "q_proj": 2},
    }));
    let warnings = select(&config.unwrap(), modules).unwrap().warnings;
    assert_eq!(warnings.len(), 3, "{warnings:?}");
    assert!(
        warnings[0].contains("query")
            && warnings[1].contains("w1")
            && warnings[2].contains("k_proj")
    );
}

#[test]
fn rank_alpha_and_scaling_by_pattern() {
    let config = config(json!({
        "target_modules": ["q_proj", "k_proj"], "r": 8, "lora_alpha": 16, "use_rslora": true,
        "rank_pattern": {"layers.0.self_attn.q_proj": 4, "q_proj": 2, r".*\.1\.self_attn\.k_proj": 32},
        "alpha_pattern": {"k_proj": 1.5, "^model.layers.0.self_attn.q_proj": 3},
    }))
    .unwrap();
    let rules = Rules::new(&config).unwrap();
    let facts = |module: &str| (rules.r(module).unwrap(), rules.lora_alpha(module).unwrap());
    assert_eq!(facts("model.layers.0.self_attn.q_proj"), (4, 3.0));
    assert_eq!(facts("model.layers.1.self_attn.q_proj"), (2, 16.0));
    assert_eq!(facts("model.layers.1.self_attn.k_proj"), (32, 1.5));
    assert_eq!(facts("model.layers.2.self_attn.k_proj"), (8, 1.5));
    // The pattern matches whole parts of the name.
    assert_eq!(facts("model.layers.2.self_attn.xk_proj"), (8, 16.0));
    let scaling = config.scaling("model.layers.0.self_attn.q_proj").unwrap();
    assert!((scaling - 3.0 / 2.0).abs() < 1e-15);
    let plain = AdapterConfig {
        use_rslora: false,
        ..config.clone()
    };
    assert!((plain.scaling("model.layers.1.self_attn.q_proj").unwrap() - 8.0).abs() < 1e-15);
}

#[test]
fn values_that_cannot_be_used() {
    let broken = |value: Value| config(value);
    assert_says(
        broken(json!({"target_modules": ["a"], "r": 0})),
        &["'r'", "at least 1", "0"],
    );
    assert_says(
        broken(json!({"target_modules": ["a"], "r": "8"})),
        &["'r'", "\"8\""],
    );
    assert_says(
        broken(json!({"target_modules": ["a"], "rank_pattern": {"a": 0}})),
        &["rank_pattern"],
    );
    assert_says(
        broken(json!({"target_modules": ["a"], "lora_dropout": 1.5})),
        &["lora_dropout=1.5"],
    );
    assert_says(
        broken(json!({"target_modules": 3})),
        &["target_modules", "3"],
    );
    assert_says(
        broken(json!({"target_modules": null})),
        &["target_modules=null"],
    );
    assert_says(
        broken(json!({"target_modules": "a", "layers_to_transform": [1]})),
        &["layers_to_transform=[1]"],
    );
    assert_says(
        broken(json!({"target_modules": ["a"], "layers_pattern": "h"})),
        &["layers_pattern"],
    );
    assert_says(
        broken(json!({"target_modules": ["a"], "peft_type": "IA3"})),
        &["peft_type=\"IA3\""],
    );
    let pattern = config(json!({"target_modules": "(q_proj"})).unwrap();
    assert_says(
        chosen(&pattern, &llama(1)),
        &["target_modules", "'(q_proj'", "not a regular expression"],
    );
    let pattern = config(json!({"target_modules": ["a"], "rank_pattern": {"a)(b": 4}})).unwrap();
    assert_says(chosen(&pattern, &llama(1)), &["rank_pattern", "'a)(b'"]);
}

#[test]
fn fields_that_mean_something_else_are_refused_by_name() {
    for (field, value) in [
        ("use_dora", json!(true)),
        ("lora_bias", json!(true)),
        ("use_qalora", json!(true)),
        ("use_bdlora", json!({"nblocks": 2})),
        ("ensure_weight_tying", json!(true)),
        ("alora_invocation_tokens", json!([1, 2])),
        ("arrow_config", json!({"top_k": 3})),
        ("kasa_config", json!({"beta": 1})),
        ("monteclora_config", json!({"num_samples": 1})),
        ("velora_config", json!({"scale": 1})),
        ("megatron_config", json!({"a": 1})),
        ("layer_replication", json!([[0, 2]])),
        ("target_parameters", json!(["experts"])),
        ("trainable_token_indices", json!([5])),
        ("bias", json!("all")),
        ("init_lora_weights", json!("pissa")),
    ] {
        let text = value.to_string();
        let result = config(json!({"target_modules": ["a"], field: value}));
        assert!(matches!(result, Err(Error::Argument(_))), "{field}");
        assert_says(result, &[field, &text, "not supported"]);
    }
    for neutral in [json!(null), json!(false), json!([]), json!({})] {
        assert!(config(json!({"target_modules": ["a"], "target_parameters": neutral})).is_ok());
    }
}

#[test]
fn unknown_fields_are_dropped_with_a_warning() {
    let map = json!({"peft_type": "LORA", "target_modules": ["a"], "use_magic": true, "task_type": "CAUSAL_LM"});
    let (config, warnings) = AdapterConfig::from_json(map.as_object().unwrap()).unwrap();
    assert_eq!(warnings.len(), 1);
    assert!(warnings[0].contains("use_magic"));
    assert!(!config.to_json().contains_key("use_magic"));
    assert_eq!(config.to_json()["task_type"], "CAUSAL_LM");
}

#[test]
fn the_file_is_sorted_and_reads_back_as_itself() {
    let config = config(json!({
        "target_modules": ["z", "a"], "r": 5, "lora_alpha": 2.5, "lora_dropout": 0.1, "use_rslora": true,
        "exclude_modules": "x.*", "layers_to_transform": [1, -1], "layers_pattern": ["h", "layers"],
        "rank_pattern": {"z": 2, "a": 3}, "alpha_pattern": {"z": 1.0, "a": 0.5},
        "base_model_name_or_path": "/modèles/𝕃", "init_lora_weights": "gaussian", "revision": null,
    }))
    .unwrap();
    let text = config.to_text();
    assert!(
        text.is_ascii() && text.contains("/mod\\u00e8les/\\ud835\\udd43"),
        "{text}"
    );
    let map: Map<String, Value> = serde_json::from_str(&text).unwrap();
    let keys: Vec<&String> = map.keys().collect();
    assert!(
        keys.is_sorted() && keys.len() == 41,
        "{} {keys:?}",
        keys.len()
    );
    assert_eq!(map["inference_mode"], true);
    assert_eq!(map["alpha_pattern"].to_string(), r#"{"z":1,"a":0.5}"#);
    assert_eq!(
        AdapterConfig::from_json(&map).unwrap(),
        (config, Vec::new())
    );
}

#[test]
fn all_linear_is_saved_as_what_it_chose() {
    let linear = llama(2);
    let modules = Modules {
        linear: &linear,
        other: &[],
        output: Some("lm_head"),
    };
    let all = config(json!({"target_modules": "all-linear"})).unwrap();
    let resolved = select(&all, modules).unwrap().resolve(&all, modules);
    let kinds = [
        "down_proj",
        "gate_proj",
        "k_proj",
        "o_proj",
        "q_proj",
        "up_proj",
        "v_proj",
    ];
    assert_eq!(
        resolved.target_modules,
        Selector::Names(kinds.map(str::to_owned).to_vec())
    );
    // Where an end of a name is not enough, whole names are.
    let linear = ["a.fc".to_owned(), "head.fc".to_owned()];
    let modules = Modules {
        linear: &linear,
        other: &[],
        output: Some("head.fc"),
    };
    let resolved = select(&all, modules).unwrap().resolve(&all, modules);
    assert_eq!(
        resolved.target_modules,
        Selector::Names(vec!["a.fc".to_owned()])
    );
    assert_eq!(chosen(&resolved, &linear).unwrap(), ["a.fc"]);
}

/// PEFT's `check_target_module_exists` for names without special characters, read off its source.
fn reference(module: &str, names: &[String], exclude: &[String], layers: Option<&[i64]>) -> bool {
    let ends = |list: &[String]| {
        list.iter()
            .any(|name| module == name || module.ends_with(&format!(".{name}")))
    };
    if ends(exclude) || !ends(names) {
        return false;
    }
    let Some(layers) =
        layers.filter(|layers| !layers.is_empty() && !names.contains(&module.to_owned()))
    else {
        return true;
    };
    // The first numbered part with something before its list's name and something after the number.
    let parts: Vec<&str> = module.split('.').collect();
    let number = (2..parts.len().saturating_sub(1)).find_map(|i| parts[i].parse::<i64>().ok());
    number.is_some_and(|number| layers.contains(&number))
}

fn module_name() -> impl Strategy<Value = String> {
    let part = prop::sample::select(vec!["a", "b", "q_proj", "layers", "0", "1", "12", "mlp"]);
    prop::collection::vec(part, 1..6).prop_map(|parts| parts.join("."))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn matching_agrees_with_the_reference(
        modules in prop::collection::vec(module_name(), 1..20),
        names in prop::collection::vec(module_name(), 1..4),
        exclude in prop::collection::vec(module_name(), 0..2),
        layers in prop::option::of(prop::collection::vec(0_i64..3, 0..3)),
    ) {
        let config = AdapterConfig {
            exclude_modules: Some(Selector::Names(exclude.clone())),
            layers_to_transform: layers.clone(),
            ..AdapterConfig::new(Selector::Names(names.clone()))
        };
        let rules = Rules::new(&config).unwrap();
        for module in &modules {
            let expected = reference(module, &names, &exclude, layers.as_deref());
            prop_assert_eq!(rules.chooses(module).unwrap(), expected, "{} in {:?}", module, &config);
        }
    }

    #[test]
    fn a_list_and_its_pattern_choose_the_same(modules in prop::collection::vec(module_name(), 1..20), names in prop::collection::vec(module_name(), 1..4)) {
        let escaped: Vec<String> = names.iter().map(|name| name.replace('.', r"\.")).collect();
        let pattern = AdapterConfig::new(Selector::Pattern(format!(r"(.*\.)?({})", escaped.join("|"))));
        let list = AdapterConfig::new(Selector::Names(names));
        let (list, pattern) = (Rules::new(&list).unwrap(), Rules::new(&pattern).unwrap());
        for module in &modules {
            prop_assert_eq!(list.chooses(module).unwrap(), pattern.chooses(module).unwrap());
        }
    }
}
