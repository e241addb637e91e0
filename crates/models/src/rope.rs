//! Rotary position embeddings (Su et al. 2021, arXiv:2104.09864) in Hugging Face's order: dimensions
//! `i` and `i + n / 2` of the first `n` of a head are a pair.

use std::f64::consts::PI;

use burn::tensor::{Device, Tensor, TensorData};
use peft::{Identity, Spans};

use crate::rope_scaling::RopeScaling;

/// The settings of a rotary embedding.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Rotary {
    /// The dimensions of a head that are rotated: the first ones.
    pub(crate) dims: usize,
    /// The base of the frequencies.
    pub(crate) theta: f64,
    pub(crate) scaling: RopeScaling,
    /// The longest text that the model was trained for, in tokens.
    pub(crate) max_positions: usize,
}

/// The cosines and sines of the positions of tokens.
///
/// Each table is `[seq, dims]` if it is that of all sequences, otherwise `[batch * seq, dims]`.
#[derive(Clone, Debug)]
pub(crate) struct Rope {
    cos: Tensor<2>,
    sin: Tensor<2>,
}

impl Rope {
    pub(crate) fn new(rotary: &Rotary, spans: &Spans) -> Self {
        let seq = spans.seq();
        let alike = rotary.scaling.longest_alike(rotary.max_positions);
        let longest = match spans.starts() {
            // The frequencies depend on the lengths of the documents.
            Some(_) if alike.is_some_and(|alike| seq > alike) => {
                spans.positions().max().into_scalar::<i64>() as usize + 1
            }
            _ => seq,
        };
        let frequencies = rotary.frequencies(longest);
        Self::of(&frequencies, rotary.magnitude() as f32, seq, spans.device()).of_spans(spans)
    }

    /// Selects the positions of the tokens of documents from those of `0 .. seq`.
    pub(crate) fn of_spans(self, spans: &Spans) -> Self {
        if spans.starts().is_none() {
            return self;
        }
        let positions = spans.positions();
        let [batch, seq] = positions.dims();
        let positions = positions.reshape([batch * seq]);
        Self {
            cos: self.cos.select(0, positions.clone()),
            sin: self.sin.select(0, positions),
        }
    }

    /// The tables of positions `0 .. seq` for angles per position, multiplied by `magnitude`.
    pub(crate) fn of(frequencies: &[f32], magnitude: f32, seq: usize, device: &Device) -> Self {
        let table = |of: fn(f32) -> f32| {
            let row = |position: usize| {
                let angles = frequencies.iter().map(move |f| position as f32 * f);
                let half: Vec<f32> = angles.map(|angle| of(angle) * magnitude).collect();
                [half.clone(), half].concat()
            };
            let values: Vec<f32> = (0..seq).flat_map(row).collect();
            // As one row: CubeCL pads rows on CUDA, and the kernel would copy padded tables in each layer.
            let dim = 2 * frequencies.len();
            let values = Tensor::<1>::from_data(TensorData::new(values, [seq * dim]), device);
            values.reshape([seq, dim])
        };
        Self {
            cos: table(f32::cos),
            sin: table(f32::sin),
        }
    }

    /// Selects `seq` positions from `start` on.
    pub(crate) fn narrow(&self, start: usize, seq: usize) -> Self {
        Self {
            cos: self.cos.clone().narrow(0, start, seq),
            sin: self.sin.clone().narrow(0, start, seq),
        }
    }

    /// Rotates queries or keys, `[batch, seq, heads, head_dim]`.
    pub(crate) fn apply(&self, x: Tensor<4>) -> Tensor<4> {
        let [batch, seq, heads, dim] = x.dims();
        let [rows, rotated] = self.cos.dims();
        if rotated < dim {
            let first = self.apply(x.clone().narrow(3, 0, rotated));
            return Tensor::cat(vec![first, x.narrow(3, rotated, dim - rotated)], 3);
        }
        let of_rows = if rows == seq {
            x
        } else {
            x.reshape([1, batch * seq, heads, dim])
        };
        let y = kernels::rotate_half(of_rows, self.cos.clone(), self.sin.clone());
        y.reshape([batch, seq, heads, dim])
    }
}

impl Rotary {
    /// The angle per position of each pair of dimensions, for a text of `seq` tokens.
    pub(crate) fn frequencies(&self, seq: usize) -> Vec<f32> {
        let dim = self.dims;
        let plain = |theta: f64| {
            (0..dim / 2).map(move |pair| 1.0 / theta.powf((2 * pair) as f64 / dim as f64))
        };
        let theta = self.theta;
        let values: Vec<f64> = match &self.scaling {
            RopeScaling::None => plain(theta).collect(),
            &RopeScaling::Linear { factor } => plain(theta).map(|f| f / factor).collect(),
            &RopeScaling::Dynamic { factor } => {
                let max = self.max_positions;
                let ratio = seq.max(max) as f64 / max as f64;
                let growth = factor * ratio - (factor - 1.0);
                // The frequency of a single pair is 1 for every base.
                let exponent = if dim > 2 {
                    dim as f64 / (dim - 2) as f64
                } else {
                    1.0
                };
                plain(theta * growth.powf(exponent)).collect()
            }
            &RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original,
            } => plain(theta)
                .map(|f| {
                    let wavelengths = original as f64 * f / (2.0 * PI);
                    if wavelengths < low_freq_factor {
                        f / factor
                    } else if wavelengths > high_freq_factor {
                        f
                    } else {
                        let kept =
                            (wavelengths - low_freq_factor) / (high_freq_factor - low_freq_factor);
                        (1.0 - kept) * f / factor + kept * f
                    }
                })
                .collect(),
            &RopeScaling::Yarn {
                factor,
                beta_fast,
                beta_slow,
                original,
                truncate,
                ..
            } => {
                let dimension = |rotations: f64| {
                    dim as f64 * (original as f64 / (rotations * 2.0 * PI)).ln()
                        / (2.0 * theta.ln())
                };
                let (mut low, mut high) = (dimension(beta_fast), dimension(beta_slow));
                if truncate {
                    (low, high) = (low.floor(), high.ceil());
                }
                let low = low.max(0.0);
                let mut high = high.min((dim - 1) as f64);
                if low == high {
                    high += 0.001;
                }
                plain(theta)
                    .enumerate()
                    .map(|(pair, f)| {
                        let divided = ((pair as f64 - low) / (high - low)).clamp(0.0, 1.0);
                        divided * f / factor + (1.0 - divided) * f
                    })
                    .collect()
            }
            RopeScaling::LongRope {
                short_factor,
                long_factor,
                original,
                ..
            } => {
                let factors = if seq > *original {
                    long_factor
                } else {
                    short_factor
                };
                plain(theta)
                    .zip(factors)
                    .map(|(f, factor)| f / factor)
                    .collect()
            }
        };
        values.into_iter().map(|f| f as f32).collect()
    }

    /// The factor of cosines and sines.
    pub(crate) fn magnitude(&self) -> f64 {
        match self.scaling {
            RopeScaling::Yarn {
                attention_factor, ..
            }
            | RopeScaling::LongRope {
                attention_factor, ..
            } => attention_factor,
            _ => 1.0,
        }
    }

    /// States the settings, each under its name after `prefix`.
    pub(crate) fn state(&self, identity: Identity, prefix: &str) -> Identity {
        let theta = ("rope_theta", self.theta.to_string());
        let settings = self.scaling.settings(self.max_positions);
        let all = [theta].into_iter().chain(settings);
        all.fold(identity, |identity, (name, value)| {
            identity.with_setting(format!("{prefix}{name}"), value)
        })
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use serde_json::{Value, json};

    use crate::Config;

    /// Against transformers' own functions: `tests/golden/rope.json`.
    #[test]
    fn frequencies_are_transformers() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/rope.json");
        let cases: Vec<Value> = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        assert_eq!(cases.len(), 12);
        for case in cases {
            let mut config = json!({
                "model_type": "llama", "vocab_size": 8, "hidden_size": 64, "intermediate_size": 8,
                "num_hidden_layers": 1, "num_attention_heads": 2,
            });
            let settings = case["config"].as_object().unwrap().clone();
            config.as_object_mut().unwrap().extend(settings);
            let config = Config::from_json(config.as_object().unwrap(), Path::new("rope"));
            let Ok(Config::Llama(config)) = config else {
                panic!("{config:?}");
            };
            let seq = case["seq"].as_u64().unwrap() as usize;
            let rotary = config.rotary();
            let found = rotary.frequencies(seq);
            let expected = case["inv_freq"].as_array().unwrap();
            assert_eq!(found.len(), expected.len());
            for (found, expected) in found.iter().zip(expected) {
                let expected = expected.as_f64().unwrap();
                let off = (f64::from(*found) / expected - 1.0).abs();
                assert!(off < 2e-6, "{}: {found} for {expected}", case["config"]);
            }
            let magnitude = rotary.magnitude();
            assert!((magnitude - case["magnitude"].as_f64().unwrap()).abs() < 1e-9);
        }
    }
}
