//! PEFT's LoRA: with rsLoRA, DoRA, trained biases, and QA-LoRA.

use burn::module::Param;
use burn::tensor::Device;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::adapter::hf::{HfConfig, HfError, HfFormat, HfReader, HfSource, read_config};
use crate::adapter::lora::{HF_A as A, HF_B as B, HF_BIAS as BIAS, HF_MAGNITUDE};
use crate::adapter::{LoraSettings, TileSettings};
use crate::adapters::CONFIG;
use crate::{Adapter, LoraAdapter, Pooling, Result, TileAdapter, TileMethod};
use tensor_files::TensorFile;

/// The norms of DoRA: PEFT writes the first name, and reads both.
const MAGNITUDES: [&str; 2] = [HF_MAGNITUDE, "lora_magnitude_vector.weight"];

pub(super) const FORMAT: HfFormat = HfFormat {
    peft_type: "LORA",
    alpha_key: Some("lora_alpha"),
    read_keys: &[
        "alpha_pattern",
        "bias",
        "exclude_modules",
        "init_lora_weights",
        "lora_alpha",
        "lora_dropout",
        "qalora_group_size",
        "rank_pattern",
        "use_dora",
        "use_qalora",
        "use_rslora",
    ],
    ignored_keys: &[
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "loftq_config",
        "lora_ga_config",
        "megatron_core",
    ],
    tensors: &[A, B, MAGNITUDES[0], MAGNITUDES[1], BIAS],
    shared: &[],
    config: || {
        json!({
            "alora_invocation_tokens": null,
            "arrow_config": null,
            "corda_config": null,
            "ensure_weight_tying": false,
            "eva_config": null,
            "exclude_modules": null,
            "init_lora_weights": true,
            "kasa_config": null,
            "layer_replication": null,
            "loftq_config": {},
            "lora_bias": false,
            "lora_ga_config": null,
            "megatron_config": null,
            "megatron_core": "megatron.core",
            "monteclora_config": null,
            "target_parameters": null,
            "trainable_token_indices": null,
            "use_bdlora": null,
            "velora_config": null,
        })
    },
    reader,
};

/// The keys that are read.
#[derive(Deserialize)]
#[serde(default)]
struct LoraConfig {
    r: usize,
    lora_alpha: f32,
    lora_dropout: f32,
    use_rslora: bool,
    use_dora: bool,
    use_qalora: bool,
    qalora_group_size: usize,
    bias: String,
    init_lora_weights: Value,
}

impl Default for LoraConfig {
    fn default() -> Self {
        Self {
            r: 8,
            lora_alpha: 8.0,
            lora_dropout: 0.0,
            use_rslora: false,
            use_dora: false,
            use_qalora: false,
            qalora_group_size: 16,
            bias: "none".into(),
            init_lora_weights: Value::Bool(true),
        }
    }
}

impl LoraConfig {
    fn check(&self) -> Result<(), String> {
        match &self.init_lora_weights {
            Value::Bool(_) => (),
            Value::String(name) if ["gaussian", "eva", "orthogonal"].contains(&name.as_str()) => (),
            other => {
                return Err(format!(
                    "init_lora_weights is {other}, which changed the base: convert the adapter to a plain LoRA in PEFT, and save it again"
                ));
            }
        }
        if self.use_qalora && self.use_dora {
            return Err("use_qalora and use_dora exclude each other".into());
        }
        let group_size = self.qalora_group_size;
        if self.use_qalora && group_size < 2 {
            return Err(format!(
                "qalora_group_size is {group_size}; it must be at least 2"
            ));
        }
        if !["none", "lora_only", "all"].contains(&self.bias.as_str()) {
            return Err(format!(
                "bias is {:?}, not none, lora_only or all",
                self.bias
            ));
        }
        Ok(())
    }

    fn read(&self, source: &mut HfSource) -> Result<Adapter> {
        let r = source.rank.unwrap_or(self.r);
        let alpha = source.alpha.unwrap_or(self.lora_alpha);
        let mut factor = |name: &str, rank_at: usize| {
            let factor = source.factor(name)?;
            let [d_in, d_out] = factor.dims();
            if factor.dims()[rank_at] == r && r > 0 {
                return Ok(factor);
            }
            let shape = [d_out, d_in];
            let problem = format!("is {shape:?}, where `{CONFIG}` says rank {r}");
            Err(source.refuse(name, problem))
        };
        let (a, b) = (factor(A, 1)?, factor(B, 0)?);
        let magnitudes: Vec<&str> = MAGNITUDES
            .into_iter()
            .filter(|name| source.tensors.contains(name))
            .collect();
        match (self.use_dora, &magnitudes[..]) {
            (false, []) | (true, [] | [_]) => (),
            (false, [name, ..]) => {
                let problem = format!("belongs to DoRA, which `{CONFIG}` does not name");
                return Err(source.refuse(name, problem));
            }
            (true, [_, name, ..]) => {
                return Err(source.refuse(name, "occurs under two names".into()));
            }
        }
        let has_bias = source.tensors.contains(BIAS);
        let bias = has_bias.then(|| source.vector(BIAS)).transpose()?;
        // PEFT takes QA-LoRA for LoRA on layers that are not GPTQ's.
        let d_in = source.linear.weight().dims()[0];
        let group_size = self.qalora_group_size;
        if self.use_qalora && a.dims()[0] == d_in / group_size {
            if bias.is_some() {
                let problem = "is trained beside QA-LoRA, which this program does not do".into();
                return Err(source.refuse(BIAS, problem));
            }
            let settings = TileSettings {
                tiles: TileMethod::QaLora,
                pool: group_size,
                repeat: 1,
                pooling: Pooling::Peft,
                alpha: if self.use_rslora {
                    alpha * (r as f32).sqrt()
                } else {
                    alpha
                },
                rank: r,
                dropout: self.lora_dropout,
            };
            let [a, b] = [a, b].map(Param::from_tensor);
            return Ok(Adapter::Tile(TileAdapter::of_product(a, b, settings)?));
        }
        let magnitude = self.use_dora.then(|| {
            let name = magnitudes.first().copied().unwrap_or(MAGNITUDES[0]);
            source.vector(name)
        });
        let settings = LoraSettings {
            alpha,
            rank_stabilized: self.use_rslora,
            dora: self.use_dora,
            bias: bias.is_some(),
            dropout: self.lora_dropout,
        };
        let [a, b] = [a, b].map(Param::from_tensor);
        let adapter = LoraAdapter::new(a, b, magnitude.transpose()?, bias, settings)?;
        Ok(Adapter::Lora(adapter))
    }
}

fn reader(config: &HfConfig, _: &mut TensorFile, _: &Device) -> Result<HfReader, HfError> {
    let config: LoraConfig = read_config(config)?;
    config.check()?;
    Ok(Box::new(move |source| config.read(source)))
}
