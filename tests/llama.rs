//! The engine's Llama against one written with candle's own operations and autograd.
#![cfg(feature = "engine")]
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::HashMap;
use std::path::Path;

use candle_core::{D, DType, Device, Tensor, Var};
use ferrotune::data::{Batch, IGNORE};
use ferrotune::dtype::DType as FileType;
use ferrotune::engine::models::{Architecture, LoadPlan, Trained, Transformer};
use ferrotune::engine::{Mode, Model};
use ferrotune::folder::{Tensor as FileTensor, write_safetensors};

const K: usize = 24;
const F: usize = 40;
const H: usize = 6;
const HKV: usize = 2;
const HEAD: usize = 8;
const VOCABULARY: usize = 37;
const LAYERS: usize = 2;
const EPS: f64 = 1e-5;

type Weights = HashMap<String, Var>;

fn shapes(tied: bool) -> Vec<(String, Vec<usize>)> {
    let mut shapes = vec![
        ("model.embed_tokens.weight".to_owned(), vec![VOCABULARY, K]),
        ("model.norm.weight".to_owned(), vec![K]),
    ];
    if !tied {
        shapes.push(("lm_head.weight".to_owned(), vec![VOCABULARY, K]));
    }
    for at in 0..LAYERS {
        for (name, shape) in [
            ("input_layernorm", vec![K]),
            ("post_attention_layernorm", vec![K]),
            ("self_attn.q_proj", vec![H * HEAD, K]),
            ("self_attn.k_proj", vec![HKV * HEAD, K]),
            ("self_attn.v_proj", vec![HKV * HEAD, K]),
            ("self_attn.o_proj", vec![K, H * HEAD]),
            ("mlp.gate_proj", vec![F, K]),
            ("mlp.up_proj", vec![F, K]),
            ("mlp.down_proj", vec![K, F]),
        ] {
            shapes.push((format!("model.layers.{at}.{name}.weight"), shape));
        }
    }
    shapes
}

/// Random weights in a folder, and the same as candle's variables in float64.
fn folder(path: &Path, tied: bool) -> Weights {
    let mut vars = HashMap::new();
    let mut values = Vec::new();
    for (name, shape) in shapes(tied) {
        let (mean, spread) = if shape.len() == 1 {
            (1.0, 0.2)
        } else {
            (0.0, 0.25)
        };
        let tensor =
            Tensor::randn(mean as f32, spread as f32, shape.as_slice(), &Device::Cpu).unwrap();
        values.push((
            name.clone(),
            shape,
            tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap(),
        ));
        let wide = tensor.to_dtype(DType::F64).unwrap();
        vars.insert(name, Var::from_tensor(&wide).unwrap());
    }
    let tensors = values
        .iter()
        .map(|(name, shape, values)| {
            FileTensor::from_f32(name.clone(), FileType::F32, shape, values)
        })
        .collect();
    write_safetensors(
        &path.join("model.safetensors"),
        tensors,
        &[("format", "pt")],
    )
    .unwrap();
    let config = serde_json::json!({
        "architectures": ["LlamaForCausalLM"], "hidden_size": K, "intermediate_size": F,
        "num_hidden_layers": LAYERS, "num_attention_heads": H, "num_key_value_heads": HKV,
        "head_dim": HEAD, "vocab_size": VOCABULARY, "max_position_embeddings": 256,
        "rms_norm_eps": EPS, "rope_theta": 10000.0, "tie_word_embeddings": tied,
    });
    std::fs::write(path.join("config.json"), config.to_string()).unwrap();
    vars
}

fn norm(x: &Tensor, weight: &Tensor) -> Tensor {
    let mean = x.sqr().unwrap().mean_keepdim(D::Minus1).unwrap();
    let scale = (mean + EPS).unwrap().sqrt().unwrap();
    x.broadcast_div(&scale)
        .unwrap()
        .broadcast_mul(weight)
        .unwrap()
}

fn linear(x: &Tensor, weight: &Tensor) -> Tensor {
    x.broadcast_matmul(&weight.t().unwrap()).unwrap()
}

/// Rotation by the half-split rule, of `[b, h, t, d]`.
fn rotate(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Tensor {
    let half = HEAD / 2;
    let (a, b) = (
        x.narrow(3, 0, half).unwrap(),
        x.narrow(3, half, half).unwrap(),
    );
    let first = (a.broadcast_mul(cos).unwrap() - b.broadcast_mul(sin).unwrap()).unwrap();
    let second = (b.broadcast_mul(cos).unwrap() + a.broadcast_mul(sin).unwrap()).unwrap();
    Tensor::cat(&[first, second], 3).unwrap()
}

/// The summed loss, from the definition.
fn reference(vars: &Weights, batch: &Batch, tied: bool) -> Tensor {
    let (b, t) = (batch.rows, batch.columns);
    let weight = |name: &str| vars[name].as_tensor().clone();
    let ids = Tensor::from_vec(batch.ids.clone(), b * t, &Device::Cpu).unwrap();
    let mut x = weight("model.embed_tokens.weight")
        .index_select(&ids, 0)
        .unwrap()
        .reshape((b, t, K))
        .unwrap();
    let angle = |wave: fn(f64) -> f64| {
        let values: Vec<f64> = batch
            .positions
            .iter()
            .flat_map(|&p| {
                (0..HEAD / 2)
                    .map(move |i| wave(f64::from(p) / 10000f64.powf((2 * i) as f64 / HEAD as f64)))
            })
            .collect();
        Tensor::from_vec(values, (b, 1, t, HEAD / 2), &Device::Cpu).unwrap()
    };
    let (cos, sin) = (angle(f64::cos), angle(f64::sin));
    let mask: Vec<f64> = (0..b * t * t)
        .map(|at| {
            let (row, i, j) = (at / (t * t), at / t % t, at % t);
            let positions = &batch.positions[row * t..(row + 1) * t];
            let start = (0..=i).rev().find(|&s| positions[s] == 0).unwrap_or(0);
            if (start..=i).contains(&j) {
                0.0
            } else {
                f64::NEG_INFINITY
            }
        })
        .collect();
    let mask = Tensor::from_vec(mask, (b, 1, t, t), &Device::Cpu).unwrap();
    for at in 0..LAYERS {
        let of = |name: &str| weight(&format!("model.layers.{at}.{name}.weight"));
        let y = norm(&x, &of("input_layernorm"));
        let heads = |name: &str, count: usize| {
            let heads = linear(&y, &of(name)).reshape((b, t, count, HEAD)).unwrap();
            let heads = heads.transpose(1, 2).unwrap().contiguous().unwrap();
            // Each key/value head serves a run of query heads.
            let shape = (b, count, H / count, t, HEAD);
            let heads = heads.unsqueeze(2).unwrap().broadcast_as(shape).unwrap();
            heads
                .contiguous()
                .unwrap()
                .reshape((b, H, t, HEAD))
                .unwrap()
        };
        let q = rotate(&heads("self_attn.q_proj", H), &cos, &sin);
        let k = rotate(&heads("self_attn.k_proj", HKV), &cos, &sin);
        let v = heads("self_attn.v_proj", HKV);
        let scores = (q.matmul(&k.t().unwrap()).unwrap() / (HEAD as f64).sqrt()).unwrap();
        let scores = scores.broadcast_add(&mask).unwrap();
        let p = candle_nn::ops::softmax(&scores, D::Minus1).unwrap();
        let o = p.matmul(&v).unwrap().transpose(1, 2).unwrap();
        let o = o.contiguous().unwrap().reshape((b, t, H * HEAD)).unwrap();
        x = (x + linear(&o, &of("self_attn.o_proj"))).unwrap();
        let y = norm(&x, &of("post_attention_layernorm"));
        let gate = candle_nn::ops::silu(&linear(&y, &of("mlp.gate_proj"))).unwrap();
        let hidden = (gate * linear(&y, &of("mlp.up_proj"))).unwrap();
        x = (x + linear(&hidden, &of("mlp.down_proj"))).unwrap();
    }
    let head = if tied {
        "model.embed_tokens.weight"
    } else {
        "lm_head.weight"
    };
    let logits = linear(&norm(&x, &weight("model.norm.weight")), &weight(head));
    let logits = logits.reshape((b * t, VOCABULARY)).unwrap();
    let logs = candle_nn::ops::log_softmax(&logits, 1).unwrap();
    let kept: Vec<f64> = batch
        .targets
        .iter()
        .map(|&v| f64::from(u8::from(v != IGNORE)))
        .collect();
    let targets: Vec<u32> = batch.targets.iter().map(|&v| v.max(0) as u32).collect();
    let targets = Tensor::from_vec(targets, (b * t, 1), &Device::Cpu).unwrap();
    let kept = Tensor::from_vec(kept, (b * t, 1), &Device::Cpu).unwrap();
    let chosen = (logs.gather(&targets, 1).unwrap() * kept).unwrap();
    chosen.sum_all().unwrap().neg().unwrap()
}

/// Two rows of 70 tokens: past one attention tile, with packed documents and untrained positions.
fn batch() -> Batch {
    let (rows, columns) = (2, 70);
    let starts = [vec![0, 13, 64, 66], vec![0]];
    let mut positions = Vec::new();
    for row in &starts {
        for at in 0..columns {
            let start = row.iter().rev().find(|&&start| start <= at).unwrap();
            positions.push((at - start) as u32);
        }
    }
    let ids: Vec<u32> = (0..rows * columns)
        .map(|at| (at * 7919 % VOCABULARY) as u32)
        .collect();
    let targets = (0..rows * columns)
        .map(|at| {
            if at % 5 == 3 {
                IGNORE
            } else {
                (at * 104_729 % VOCABULARY) as i32
            }
        })
        .collect();
    Batch {
        rows,
        columns,
        ids,
        targets,
        positions,
    }
}

#[test]
fn loss_and_every_gradient_agree_with_candle() {
    for tied in [false, true] {
        let path = tempfile::tempdir().unwrap();
        let vars = folder(path.path(), tied);
        let config = Architecture::read(path.path()).unwrap();
        let plan = LoadPlan {
            quantize: None,
            trained: Trained::everything(),
            positions: 256,
            seed: 0,
            hollow: false,
        };
        let model = Transformer::load(path.path(), config, &plan).unwrap();
        let batch = batch();

        let (loss, count) = model.loss(&batch, Mode::Train { seed: 0 }).unwrap();
        assert_eq!(count, batch.target_count());
        let expected = reference(&vars, &batch, tied);
        let truth = expected.to_scalar::<f64>().unwrap();
        let got = f64::from(loss.to_scalar::<f32>().unwrap());
        assert!((got - truth).abs() / truth < 1e-5, "{got} {truth}");
        let (evaluated, _) = model.loss(&batch, Mode::Eval).unwrap();
        assert_eq!(
            evaluated.to_scalar::<f32>().unwrap(),
            loss.to_scalar::<f32>().unwrap()
        );

        let gradients = loss.backward().unwrap();
        let true_gradients = expected.backward().unwrap();
        let mut seen = 0;
        for parameter in model.parameters() {
            let flat = gradients
                .get(parameter.var.as_tensor())
                .expect("a gradient");
            let flat = flat.to_vec1::<f32>().unwrap();
            for segment in &parameter.segments {
                let truth = true_gradients.get(vars[&segment.name].as_tensor()).unwrap();
                let truth = truth.flatten_all().unwrap().to_vec1::<f64>().unwrap();
                let got = &flat[segment.offset..segment.offset + segment.len()];
                let norm = truth.iter().map(|v| v * v).sum::<f64>().sqrt();
                let off = got
                    .iter()
                    .zip(&truth)
                    .map(|(&g, t)| (f64::from(g) - t).powi(2))
                    .sum::<f64>()
                    .sqrt();
                assert!(
                    norm > 0.0 && off / norm < 1e-5,
                    "{}: {:e}",
                    segment.name,
                    off / norm
                );
                seen += 1;
            }
        }
        assert_eq!(seen, vars.len());
    }
}

#[test]
fn a_second_backward_of_one_forward_is_refused() {
    let path = tempfile::tempdir().unwrap();
    folder(path.path(), true);
    let config = Architecture::read(path.path()).unwrap();
    let plan = LoadPlan {
        quantize: None,
        trained: Trained::everything(),
        positions: 256,
        seed: 0,
        hollow: false,
    };
    let model = Transformer::load(path.path(), config, &plan).unwrap();
    let (loss, _) = model.loss(&batch(), Mode::Train { seed: 0 }).unwrap();
    loss.backward().unwrap();
    assert!(loss.backward().is_err());
}

#[test]
fn batches_that_do_not_fit_are_refused() {
    let path = tempfile::tempdir().unwrap();
    folder(path.path(), true);
    let config = Architecture::read(path.path()).unwrap();
    let plan = LoadPlan {
        quantize: None,
        trained: Trained::nothing(),
        positions: 16,
        seed: 0,
        hollow: false,
    };
    let model = Transformer::load(path.path(), config, &plan).unwrap();
    let good = Batch {
        rows: 1,
        columns: 2,
        ids: vec![1, 2],
        targets: vec![2, IGNORE],
        positions: vec![0, 1],
    };
    model.loss(&good, Mode::Eval).unwrap();
    for (bad, part) in [
        (
            Batch {
                ids: vec![1, VOCABULARY as u32],
                ..good.clone()
            },
            "vocabulary",
        ),
        (
            Batch {
                targets: vec![-7, 0],
                ..good.clone()
            },
            "target -7",
        ),
        (
            Batch {
                positions: vec![0, 16],
                ..good.clone()
            },
            "position 16",
        ),
        (
            Batch {
                rows: 2,
                ..good.clone()
            },
            "rows × columns",
        ),
    ] {
        let error = model.loss(&bad, Mode::Eval).unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    }
}
