//! Gemma 3's decoder of text (Gemma Team 2025, arXiv:2503.19786): norms of queries and keys, and rotations
//! of their own in layers with a window.

use burn::module::Module;
use burn::tensor::Tensor;
use kernels::Scores;
use peft::Identity;
use serde_json::{Map, Value, json};

use super::gated::gated_parts;
use super::gemma2;
use super::llama::{LlamaConfig, with_settings};
use crate::Result;
use crate::activation::Activation;
use crate::architecture::{Architecture, DecoderBlock, ModelType, Parts, Shape};
use crate::attention::{Heads, NormedAttention};
use crate::kv_cache::KvCache;
use crate::mlp::GatedMlp;
use crate::norm::Norm;
use crate::positions::{Positions, Reach};
use crate::rope::Rotary;
use crate::rope_scaling::{self, RopeScaling};
use crate::settings::{Settings, setters};
use crate::source::Source;

/// The bases of the frequencies of layers without a window, and of those with one.
const THETAS: [f64; 2] = [1_000_000.0, 10_000.0];

/// The layers of which one has no window.
const PATTERN: usize = 6;

/// The shape of the decoder of text of a Gemma 3.
///
/// The default has the settings of Gemma-3-1B beside its sizes, and the sizes of Llama-2-7B.
///
/// # Examples
/// ```
/// use models::{Gemma3Config, Model};
///
/// let llama = Gemma3Config::default().llama.with_num_hidden_layers(1).with_vocab_size(16);
/// let config = Gemma3Config::default().with_llama(llama);
/// let model = Model::init(config, 0, &burn::tensor::Device::flex());
/// assert_eq!(model.config().to_json()["model_type"], "gemma3_text");
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct Gemma3Config {
    /// The shape of the LLaMA that it is but for its norms and the factor of its embeddings, with the
    /// rotation of the layers without a window. Without [`LlamaConfig::layer_attention`] one layer of six
    /// has no window.
    pub llama: LlamaConfig,
    /// The base of the frequencies in layers with a window.
    pub rope_local_theta: f64,
    /// The scaling of the frequencies in layers with a window.
    pub rope_local_scaling: RopeScaling,
    /// Scores are divided by its square root.
    pub query_pre_attn_scalar: usize,
    /// The soft cap of the logits.
    pub final_logit_softcapping: Option<f64>,
}

impl Default for Gemma3Config {
    fn default() -> Self {
        let llama = LlamaConfig::default()
            .with_rms_norm_eps(1e-6)
            .with_hidden_act(Activation::GeluTanh)
            .with_sliding_window(512)
            .with_rope_theta(THETAS[0])
            .with_max_position_embeddings(32_768)
            .with_tie_word_embeddings(true);
        Self {
            llama,
            rope_local_theta: THETAS[1],
            rope_local_scaling: RopeScaling::None,
            query_pre_attn_scalar: 256,
            final_logit_softcapping: None,
        }
    }
}

setters! {
    Gemma3Config:
    with_llama llama LlamaConfig,
    with_rope_local_theta rope_local_theta f64,
    with_rope_local_scaling rope_local_scaling RopeScaling,
    with_query_pre_attn_scalar query_pre_attn_scalar usize,
    with_final_logit_softcapping final_logit_softcapping impl Into<Option<f64>>,
}

/// Whether a layer has a window, of a rule by which one of `pattern` layers has none.
fn has_window(layer: usize, pattern: usize) -> bool {
    !(layer + 1).is_multiple_of(pattern)
}

/// Whether a layer has a window where nothing is stated.
fn is_usual(layer: usize) -> bool {
    has_window(layer, PATTERN)
}

impl Gemma3Config {
    fn read(settings: &Settings) -> Result<Self> {
        // transformers has the settings, and computes nothing with them.
        settings.ignore(&["attn_logit_softcapping", "_sliding_window_pattern"]);
        let llama = LlamaConfig::read(settings, gemma2::defaults(131_072))?;
        let pattern = settings.size_or("sliding_window_pattern", PATTERN)?;
        let rule = |layer| has_window(layer, pattern);
        let llama = gemma2::read_layers(llama, settings, is_usual, rule)?;
        let [global, local] = read_rotations(&llama, settings)?;
        Ok(Self {
            llama: llama.with_rotary(global),
            rope_local_theta: local.theta,
            rope_local_scaling: local.scaling,
            query_pre_attn_scalar: settings.size_or("query_pre_attn_scalar", 256)?,
            final_logit_softcapping: settings.optional_positive("final_logit_softcapping")?,
        })
    }

    /// The `config.json` of a new model of this shape.
    ///
    /// # Panics
    /// If there is a rope scaling, or there are biases of some projections of the attention alone, or of the
    /// MLP.
    pub fn to_json(&self) -> Map<String, Value> {
        assert_eq!(
            self.rope_local_scaling,
            RopeScaling::None,
            "a new model has no rope scaling"
        );
        let of_type = json!({
            "architectures": ["Gemma3ForCausalLM"],
            "model_type": "gemma3_text",
            "query_pre_attn_scalar": self.query_pre_attn_scalar,
            "final_logit_softcapping": self.final_logit_softcapping,
            "rope_local_base_freq": self.rope_local_theta,
        });
        let json = gemma2::to_json(&self.llama, is_usual);
        with_settings(json.into(), of_type)
    }
}

/// The rotations of layers without a window and with one: `rope_parameters` has an object for each, and
/// older files have `rope_scaling` and `rope_theta` for the first and `rope_local_base_freq` for the second.
fn read_rotations(llama: &LlamaConfig, settings: &Settings) -> Result<[Rotary; 2]> {
    let parameters = settings.object("rope_parameters")?;
    let parameters = parameters.unwrap_or_else(|| settings.nothing());
    if parameters.has("rope_type") || parameters.has("rope_theta") {
        let problem =
            "is one rotation; there is one for full_attention and one for sliding_attention";
        return Err(settings.refuse("rope_parameters", problem));
    }
    let of_type = |layer_type: &str| -> Result<Settings> {
        let entry = parameters.object(layer_type)?;
        Ok(entry.unwrap_or_else(|| settings.nothing()))
    };
    let (mut global, local) = (of_type("full_attention")?, of_type("sliding_attention")?);
    if let Some(scaling) = settings.object("rope_scaling")?.filter(|of| !of.is_empty()) {
        if !global.is_empty() {
            let problem = "is there beside `rope_parameters.full_attention`; keep one of them";
            return Err(settings.refuse("rope_scaling", problem));
        }
        global = scaling;
    }
    let rotary = |entry: &Settings, beside: &str, default: f64| -> Result<Rotary> {
        let theta = settings.number_or(beside, default)?;
        let rotary = rope_scaling::of_object(entry, &llama.of_model().with_theta(theta))?;
        rope_scaling::whole_heads(entry, rotary, llama.head_dim)
    };
    Ok([
        rotary(&global, "rope_theta", THETAS[0])?,
        rotary(&local, "rope_local_base_freq", THETAS[1])?,
    ])
}

impl Architecture for Gemma3Config {
    type Block = Gemma3Block;

    const MODEL_TYPES: &'static [ModelType<Self>] = &[ModelType {
        name: "gemma3_text",
        read: Self::read,
    }];

    fn shape(&self) -> Shape {
        let shape = gemma2::shape(&self.llama, self.final_logit_softcapping);
        let local = &self.rope_local_scaling;
        let local = local.longest_alike(self.llama.max_position_embeddings);
        Shape {
            max_cached: shape.max_cached.into_iter().chain(local).min(),
            ..shape
        }
    }

    fn identity(&self) -> Identity {
        let cap = self.final_logit_softcapping.unwrap_or(0.0);
        (self.llama.identity())
            .with_setting("architecture", "gemma3_text")
            .with_setting("query_pre_attn_scalar", self.query_pre_attn_scalar)
            .with_setting("final_logit_softcapping", cap)
    }

    fn untie(&mut self) {
        self.llama.untie();
    }

    fn reach(&self, layer: usize) -> Reach {
        let (global, has_window) = (
            self.llama.rotary(),
            self.llama.attention(layer, is_usual).has_window,
        );
        let rotary = if has_window {
            Rotary {
                theta: self.rope_local_theta,
                scaling: self.rope_local_scaling.clone(),
                ..global
            }
        } else {
            global
        };
        Reach {
            window: self.llama.sliding_window.filter(|_| has_window),
            rotary: Some(rotary),
            ..Reach::default()
        }
    }
}

#[derive(Module, Debug)]
pub(crate) struct Gemma3Block {
    input_layernorm: Norm,
    self_attn: NormedAttention,
    post_attention_layernorm: Norm,
    pre_feedforward_layernorm: Norm,
    mlp: GatedMlp,
    post_feedforward_layernorm: Norm,
}

impl DecoderBlock for Gemma3Block {
    type Config = Gemma3Config;

    gated_parts! {
        config => config.llama,
        attention: self_attn.attention,
        mlp: mlp,
        norms:
            "input_layernorm" input_layernorm [config.llama.hidden_size],
            "self_attn.q_norm" self_attn.q_norm [config.llama.head_dim],
            "self_attn.k_norm" self_attn.k_norm [config.llama.head_dim],
            "post_attention_layernorm" post_attention_layernorm [config.llama.hidden_size],
            "pre_feedforward_layernorm" pre_feedforward_layernorm [config.llama.hidden_size],
            "post_feedforward_layernorm" post_feedforward_layernorm [config.llama.hidden_size],
    }

    fn build<S: Source>(mut parts: Parts<Self, S>) -> Result<Self, S::Error> {
        let [
            input_layernorm,
            q_norm,
            k_norm,
            post_attention_layernorm,
            pre_feedforward_layernorm,
            post_feedforward_layernorm,
        ] = parts.norms()?;
        let config = parts.config;
        let heads = Heads {
            scores: Scores::new(1.0 / (config.query_pre_attn_scalar as f64).sqrt()),
            ..Heads::new(config.llama.head_dim, parts.reach)
        };
        let (attention, mlp) = parts.attention_and_mlp(heads, config.llama.hidden_act)?;
        Ok(Self {
            input_layernorm,
            self_attn: NormedAttention {
                attention,
                q_norm,
                k_norm,
            },
            post_attention_layernorm,
            pre_feedforward_layernorm,
            mlp,
            post_feedforward_layernorm,
        })
    }

    fn attend(
        &self,
        input: Tensor<3>,
        positions: &Positions,
        cache: Option<&mut KvCache>,
    ) -> Tensor<3> {
        self.self_attn.attend(input, positions, cache)
    }

    fn enter(&self, x: Tensor<3>) -> Tensor<3> {
        self.input_layernorm.forward(x)
    }

    fn advance(
        &self,
        stage: usize,
        residual: Tensor<3>,
        input: Tensor<3>,
    ) -> (Tensor<3>, Tensor<3>) {
        let norms = [
            &self.post_attention_layernorm,
            &self.pre_feedforward_layernorm,
            &self.post_feedforward_layernorm,
        ];
        let o_proj = &self.self_attn.attention.o_proj;
        self.mlp
            .advance_between_norms(stage, residual, input, o_proj, norms)
    }
}
