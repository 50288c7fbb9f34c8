//! One token after another, with the keys and values of the tokens before kept.

use super::bottleneck::add_residual;
use super::head::logits;
use super::virtual_tokens::Virtual;
use super::{Ends, Transformer};
use crate::engine::Mode;
use crate::error::{Error, Result};
use crate::matmul::{Into, Mat, MatMut, Threads, matmul};
use crate::scratch::Scratch;
use crate::simd::{exp, max};

/// A sequence in the making.
pub struct Decoder<'a> {
    model: &'a Transformer,
    /// The output layer in f32, widened once.
    output: Vec<f32>,
    thetas: Vec<Vec<f32>>,
    caches: Vec<Cache>,
    length: usize,
}

/// Keys and values of one layer, `[hkv][length, d]` each.
struct Cache {
    keys: Vec<Vec<f32>>,
    values: Vec<Vec<f32>>,
}

impl<'a> Decoder<'a> {
    pub fn new(model: &'a Transformer) -> Result<Self> {
        let thetas = model
            .parameters
            .iter()
            .map(|parameter| Ok(parameter.var.to_vec1::<f32>()?))
            .collect::<Result<_>>()?;
        if !matches!(model.ends, Ends::Language { .. }) {
            return Err(Error::argument(format!(
                "{}: a classification model generates no text",
                model.folder.display()
            )));
        }
        let none = || vec![Vec::new(); model.architecture.num_key_value_heads];
        let caches = model
            .layers
            .iter()
            .map(|_| Cache {
                keys: none(),
                values: none(),
            })
            .collect();
        let mut decoder = Self {
            model,
            output: model.output_weights()?,
            thetas,
            caches,
            length: 0,
        };
        decoder.begin()?;
        Ok(decoder)
    }

    /// Reads the virtual tokens.
    fn begin(&mut self) -> Result<()> {
        let (model, count) = (self.model, self.model.virtual_tokens);
        if model.prompt.is_some() {
            let number = |number| Virtual {
                token: number,
                number,
            };
            let virtuals: Vec<Virtual> = (0..count).map(number).collect();
            self.read(&vec![0; count], &virtuals)?;
            return Ok(());
        }
        for (layer, cache) in model.layers.iter().zip(&mut self.caches) {
            let attention = &layer.attention;
            let theta = layer.attention_theta.map_or(&[][..], |i| &self.thetas[i]);
            let d = attention.d;
            for row in attention.prefix(theta).chunks_exact(2 * attention.hkv * d) {
                let (keys, values) = row.split_at(attention.hkv * d);
                let heads = keys.chunks_exact(d).zip(values.chunks_exact(d));
                for (kv, (key, value)) in heads.enumerate() {
                    cache.keys[kv].extend_from_slice(key);
                    cache.values[kv].extend_from_slice(value);
                }
            }
        }
        self.length = count;
        Ok(())
    }

    /// Tokens read so far, virtual ones among them.
    pub fn length(&self) -> usize {
        self.length
    }

    /// Tokens a sequence can have.
    pub fn capacity(&self) -> usize {
        self.model.positions
    }

    fn theta(&self, parameter: Option<usize>) -> &[f32] {
        parameter.map_or(&[], |index| &self.thetas[index])
    }

    /// Reads `ids` after what was read before; logits `[vocabulary]` of what follows the last.
    pub fn step(&mut self, ids: &[u32]) -> Result<Vec<f32>> {
        let model = self.model;
        let config = &model.architecture;
        if ids.is_empty() {
            return Err(Error::argument("nothing to read: the prompt has no token"));
        }
        if self.length + ids.len() > self.capacity() {
            return Err(Error::argument(format!(
                "a sequence of {} tokens does not fit the model's {} positions",
                self.length + ids.len(),
                self.capacity()
            )));
        }
        if let Some(id) = ids.iter().find(|&&id| id as usize >= config.vocab_size) {
            return Err(Error::argument(format!(
                "token id {id} is outside the model's vocabulary of {}",
                config.vocab_size
            )));
        }
        let x = self.read(ids, &[])?;
        let k = config.hidden_size;
        let last = &x[x.len() - k..];
        let Ends::Language {
            norm, norm_theta, ..
        } = &model.ends
        else {
            return Err(Error::run("a classification model generates no text"));
        };
        let normed = norm.forward(last, self.theta(*norm_theta));
        Ok(logits(&normed, &self.output, k))
    }

    /// Hidden states `[·, k]` of tokens after those before.
    fn read(&mut self, ids: &[u32], virtuals: &[Virtual]) -> Result<Vec<f32>> {
        let model = self.model;
        let positions: Vec<u32> = (self.length..self.length + ids.len())
            .map(|position| position as u32)
            .collect();
        let mut x = model
            .embed(ids, &positions, virtuals, Mode::Eval)?
            .flatten_all()?
            .to_vec1::<f32>()?;
        for at in 0..model.layers.len() {
            let layer = &model.layers[at];
            let y = self.attend(at, &x)?;
            let theta = self.theta(layer.attention_theta);
            add_residual(&*layer.attention, theta, &mut x, y)?;
            let y = self.feed(at, &x)?;
            add_residual(&*layer.mlp, self.theta(layer.mlp_theta), &mut x, y)?;
        }
        self.length += ids.len();
        Ok(x)
    }

    fn feed(&self, at: usize, x: &[f32]) -> Result<Scratch> {
        let layer = &self.model.layers[at];
        let mlp = &layer.mlp;
        let theta = self.theta(layer.mlp_theta);
        let (theta_in, theta) = theta.split_at(mlp.up.theta_len());
        let (theta_down, theta_norm) = theta.split_at(mlp.down.theta_len());
        let normed = mlp.norm.forward(x, theta_norm);
        let (up, _) = mlp.up.forward(&normed, theta_in, None)?;
        let hidden = mlp.activation.forward(&up, mlp.down.k);
        Ok(mlp.down.forward(&hidden, theta_down, None)?.0)
    }

    fn attend(&mut self, at: usize, x: &[f32]) -> Result<Scratch> {
        let model = self.model;
        let layer = &model.layers[at];
        let attention = &layer.attention;
        let (h, hkv, d) = (attention.h, attention.hkv, attention.d);
        let theta = layer.attention_theta.map_or(&[][..], |i| &self.thetas[i]);
        let (theta_qkv, theta) = theta.split_at(attention.qkv.theta_len());
        let (theta_o, theta) = theta.split_at(attention.o.theta_len());
        let theta_norm = &theta[attention.prefix_len()..];
        let normed = attention.norm.forward(x, theta_norm);
        let (mut rows, _) = attention.qkv.forward(&normed, theta_qkv, None)?;
        let width = (h + 2 * hkv) * d;
        let m = rows.len() / width;
        let cache = &mut self.caches[at];
        for (token, row) in rows.chunks_exact_mut(width).enumerate() {
            if let Some(rotations) = &attention.rotations {
                for head in row[..(h + hkv) * d].chunks_exact_mut(d) {
                    rotations.rotate(head, self.length + token, false);
                }
            }
            let (keys, values) = row[h * d..].split_at(hkv * d);
            let heads = keys.chunks_exact(d).zip(values.chunks_exact(d));
            for (kv, (key, value)) in heads.enumerate() {
                cache.keys[kv].extend_from_slice(key);
                cache.values[kv].extend_from_slice(value);
            }
        }
        let mut out = Scratch::dirty(m * h * d);
        let mut scores = Vec::new();
        for head in 0..h {
            let kv = head / (h / hkv);
            let all = self.length + m;
            let (keys, values) = (&cache.keys[kv], &cache.values[kv]);
            for token in 0..m {
                let seen = self.length + token + 1;
                let query = &rows[token * width + head * d..][..d];
                scores.resize(all, 0.0);
                let scores = &mut scores[..seen];
                let one = Threads::One;
                matmul(
                    MatMut::new(scores, seen, 1),
                    Into::Overwrite,
                    1.0 / (d as f32).sqrt(),
                    Mat::new(&keys[..seen * d], seen, d),
                    Mat::new(query, d, 1),
                    one,
                );
                let top = max(scores);
                let mut total = 0.0;
                for score in scores.iter_mut() {
                    *score = exp(*score - top);
                    total += *score;
                }
                let out = &mut out[(token * h + head) * d..][..d];
                let scores = Mat::new(scores, 1, seen);
                let values = Mat::new(&values[..seen * d], seen, d);
                let into = MatMut::new(out, 1, d);
                matmul(into, Into::Overwrite, 1.0 / total, scores, values, one);
            }
        }
        Ok(attention.o.forward(&out, theta_o, None)?.0)
    }
}
