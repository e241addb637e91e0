//! PEFT's LoRA: with rsLoRA, DoRA, trained biases, and QA-LoRA.

use burn::module::Param;
use burn::tensor::Device;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::adapter::hf::{HfConfig, HfError, HfFormat, HfKey, HfReader, HfSource, read_config};
use crate::adapter::lora::{HF_A as A, HF_B as B, HF_BIAS as BIAS, HF_MAGNITUDE};
use crate::adapter::{LoraSettings, TileSettings};
use crate::adapters::CONFIG;
use crate::{Adapter, LoraAdapter, Pooling, Result, TileAdapter, TileMethod};
use tensor_files::TensorFile;

/// The norms of DoRA: PEFT writes the first name, and reads both.
const MAGNITUDES: [&str; 2] = [HF_MAGNITUDE, "lora_magnitude_vector.weight"];

const KEYS: [HfKey; 29] = [
    HfKey::read("alpha_pattern"),
    HfKey::read("bias"),
    HfKey::read("ensure_weight_tying"),
    HfKey::read("exclude_modules"),
    HfKey::read("init_lora_weights"),
    HfKey::read("lora_alpha"),
    HfKey::read("lora_dropout"),
    HfKey::read("qalora_group_size"),
    HfKey::read("rank_pattern"),
    HfKey::read("trainable_token_indices"),
    HfKey::read("use_dora"),
    HfKey::read("use_qalora"),
    HfKey::read("use_rslora"),
    HfKey::ignored(
        "corda_config",
        "of an initialization, which `init_lora_weights` names",
    ),
    HfKey::ignored(
        "eva_config",
        "of an initialization, which `init_lora_weights` names",
    ),
    HfKey::ignored(
        "loftq_config",
        "of an initialization, which `init_lora_weights` names",
    ),
    HfKey::ignored(
        "lora_ga_config",
        "of an initialization, which `init_lora_weights` names",
    ),
    HfKey::ignored(
        "megatron_core",
        "the name of a module, which `megatron_config` puts to use",
    ),
    HfKey::ignored("runtime_config", "where weights are kept while PEFT runs"),
    HfKey::ignored(
        "velora_config",
        "of the backward pass, which stores fewer activations",
    ),
    HfKey::refused(
        "alora_invocation_tokens",
        "an activated LoRA adapts the tokens after an invocation alone",
    ),
    HfKey::refused(
        "arrow_config",
        "Arrow chooses among adapters for each token",
    ),
    HfKey::refused("kasa_config", "KaSA truncates the weights of the base"),
    HfKey::refused(
        "layer_replication",
        "it builds a model of repeated layers, which the base is not",
    ),
    HfKey::refused(
        "lora_bias",
        "the factor `lora_B` has a bias, which is added to the output",
    ),
    HfKey::refused(
        "megatron_config",
        "layers of Megatron are divided among processes",
    ),
    HfKey::refused(
        "monteclora_config",
        "MonteCLoRA draws samples of the factors",
    ),
    HfKey::refused(
        "target_parameters",
        "it adapts parameters that are no layer, such as those of experts",
    ),
    HfKey::refused("use_bdlora", "the factors of BD-LoRA are block-diagonal"),
];

pub(super) const FORMAT: HfFormat = HfFormat {
    peft_type: "LORA",
    alpha_key: Some("lora_alpha"),
    keys: &KEYS,
    tensors: &[A, B, MAGNITUDES[0], MAGNITUDES[1], BIAS],
    aliases: &[("lora_embedding_A", A), ("lora_embedding_B", B)],
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

/// Initializations that leave the base as it is.
const KEEPS_BASE: [&str; 4] = ["eva", "gaussian", "mica", "orthogonal"];

/// Whether an initialization takes what it puts into the factors from the weights of the base.
fn changes_base(name: &str) -> bool {
    let name = name.to_lowercase();
    let families = ["corda", "loftq", "lora_ga", "olora", "pissa"];
    families.iter().any(|family| name.starts_with(family))
}

impl LoraConfig {
    fn check(&self) -> Result<(), String> {
        match &self.init_lora_weights {
            Value::Null | Value::Bool(_) => (),
            Value::String(name) if KEEPS_BASE.contains(&&name.to_lowercase()[..]) => (),
            Value::String(name) if changes_base(name) => {
                return Err(format!(
                    "init_lora_weights is \"{name}\", which changed the base: convert the adapter to a plain LoRA in PEFT (`save_pretrained` with `path_initial_model_for_weight_conversion`), or save the changed base and merge into it"
                ));
            }
            other => {
                return Err(format!(
                    "init_lora_weights is {other}, which PEFT 0.21.2 does not know"
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
            .filter(|name| source.tensors.contains_key(name))
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
        let has_bias = source.tensors.contains_key(BIAS);
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
