use crate::Result;
use crate::rope::Rotary;
use crate::settings::{Settings, is_positive};

/// The scaling of the frequencies of a rotary embedding for longer texts, as in transformers.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// No scaling.
    None,
    /// All frequencies are divided by `factor`.
    Linear {
        /// The ratio of the longest text to `max_position_embeddings`.
        factor: f64,
    },
    /// The base grows for texts longer than `max_position_embeddings` (NTK-aware), for all texts of a
    /// batch by the longest one.
    Dynamic {
        /// The ratio of the longest text to `max_position_embeddings`.
        factor: f64,
    },
    /// Low frequencies are divided and high ones kept (LLaMA 3.1).
    Llama3 {
        /// The divisor of the low frequencies.
        factor: f64,
        /// Wavelengths above `original / low_freq_factor` are divided.
        low_freq_factor: f64,
        /// Wavelengths below `original / high_freq_factor` are kept.
        high_freq_factor: f64,
        /// Positions before the model was extended.
        original: usize,
    },
    /// A ramp from kept to divided frequencies (YaRN, Peng et al. 2023, arXiv:2309.00071).
    Yarn {
        /// The divisor of the low frequencies.
        factor: f64,
        /// The factor of cosines and sines.
        attention_factor: f64,
        /// Rotations above which a frequency is kept.
        beta_fast: f64,
        /// Rotations below which a frequency is divided.
        beta_slow: f64,
        /// Positions before the model was extended.
        original: usize,
        /// Whether the ramp begins and ends at whole dimensions.
        truncate: bool,
    },
    /// Each frequency is divided by a factor of its own, for texts longer than `original` by another
    /// (LongRoPE, Ding et al. 2024, arXiv:2402.13753).
    LongRope {
        /// The divisors for texts of up to `original` tokens, one for each pair of dimensions.
        short_factor: Vec<f64>,
        /// The divisors for longer texts.
        long_factor: Vec<f64>,
        /// The factor of cosines and sines.
        attention_factor: f64,
        /// Positions before the model was extended.
        original: usize,
    },
}

impl RopeScaling {
    /// The longest text whose frequencies are those of every shorter one, in tokens, if there is a limit.
    pub(crate) fn longest_alike(&self, max_positions: usize) -> Option<usize> {
        match self {
            Self::Dynamic { .. } => Some(max_positions),
            Self::LongRope { original, .. } => Some(*original),
            _ => None,
        }
    }

    /// The longest text of a model with so many positions, in tokens.
    pub(crate) fn max_seq_len(&self, max_positions: usize) -> usize {
        match self {
            Self::None | Self::Llama3 { .. } | Self::LongRope { .. } => max_positions,
            // Files differ in whether the positions are those before or after scaling.
            Self::Linear { factor } | Self::Dynamic { factor } | Self::Yarn { factor, .. } => {
                max_positions.max((max_positions as f64 * factor) as usize)
            }
        }
    }

    /// The settings of the scaling of a model with so many positions, each as it is used.
    pub(crate) fn settings(&self, max_positions: usize) -> Vec<(&'static str, String)> {
        let (name, settings): (_, Vec<(_, String)>) = match self {
            Self::None => ("default", Vec::new()),
            Self::Linear { factor } => ("linear", vec![("rope_factor", factor.to_string())]),
            Self::Dynamic { factor } => (
                "dynamic",
                vec![
                    ("rope_factor", factor.to_string()),
                    ("max_position_embeddings", max_positions.to_string()),
                ],
            ),
            Self::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original,
            } => (
                "llama3",
                vec![
                    ("rope_factor", factor.to_string()),
                    ("low_freq_factor", low_freq_factor.to_string()),
                    ("high_freq_factor", high_freq_factor.to_string()),
                    ("original_max_position_embeddings", original.to_string()),
                ],
            ),
            Self::Yarn {
                factor,
                attention_factor,
                beta_fast,
                beta_slow,
                original,
                truncate,
            } => (
                "yarn",
                vec![
                    ("rope_factor", factor.to_string()),
                    ("attention_factor", attention_factor.to_string()),
                    ("beta_fast", beta_fast.to_string()),
                    ("beta_slow", beta_slow.to_string()),
                    ("original_max_position_embeddings", original.to_string()),
                    ("truncate", truncate.to_string()),
                ],
            ),
            Self::LongRope {
                short_factor,
                long_factor,
                attention_factor,
                original,
            } => (
                "longrope",
                vec![
                    ("short_factor", format!("{short_factor:?}")),
                    ("long_factor", format!("{long_factor:?}")),
                    ("attention_factor", attention_factor.to_string()),
                    ("original_max_position_embeddings", original.to_string()),
                ],
            ),
        };
        let mut all = vec![("rope_type", name.to_string())];
        all.extend(settings);
        all
    }
}

/// What a rotary embedding depends on beside its own object of settings.
#[derive(Clone, Copy, Debug)]
pub(crate) struct OfModel {
    pub(crate) head_dim: usize,
    pub(crate) max_positions: usize,
    /// The base of the frequencies where the object states none.
    pub(crate) theta: f64,
    /// The part of each head that is rotated where the object states none.
    pub(crate) partial: f64,
    /// The positions before the model was extended, which have priority over those of the object.
    pub(crate) original: Option<usize>,
}

impl OfModel {
    /// Whole heads of a model whose `config.json` states nothing beside the object.
    pub(crate) fn new(head_dim: usize, max_positions: usize) -> Self {
        Self {
            head_dim,
            max_positions,
            theta: 10_000.0,
            partial: 1.0,
            original: None,
        }
    }

    pub(crate) fn with_theta(mut self, theta: f64) -> Self {
        self.theta = theta;
        self
    }
}

/// Reads the rotary embedding of all layers of a model, in both of transformers' spellings:
/// `rope_scaling` with `rope_theta` beside it, and `rope_parameters`.
///
/// As in transformers, `rope_scaling` has priority where both are there, and
/// `original_max_position_embeddings` beside them over that in them.
///
/// # Errors
/// [`ConfigError::Setting`](crate::ConfigError::Setting) for a scaling that is unknown or incomplete.
pub(crate) fn read(settings: &Settings, mut model: OfModel) -> Result<Rotary> {
    const ORIGINAL: &str = "original_max_position_embeddings";
    let parameters = settings.object("rope_parameters")?;
    let scaling = settings.object("rope_scaling")?;
    let entry = scaling.filter(|scaling| !scaling.is_empty()).or(parameters);
    let states_theta = |entry: &Settings| entry.get("rope_theta").is_some();
    // Files that state it in the object may have a null beside it.
    let beside = settings.get("rope_theta").is_some();
    if beside && !entry.as_ref().is_some_and(states_theta) {
        model.theta = theta(settings, model.theta)?;
    }
    if let Some(partial) = settings.optional_positive("partial_rotary_factor")? {
        model.partial = partial;
    }
    if settings.get(ORIGINAL).is_some() {
        model.original = Some(settings.size(ORIGINAL)?);
    }
    match entry {
        Some(entry) => of_object(&entry, &model),
        None => of_object(&settings.nothing(), &model),
    }
}

/// Refuses a rotation of a part of each head.
pub(crate) fn whole_heads(settings: &Settings, rotary: Rotary, head_dim: usize) -> Result<Rotary> {
    if rotary.dims == head_dim {
        return Ok(rotary);
    }
    let dims = rotary.dims;
    let problem = format!("rotates {dims} of {head_dim} dimensions, which is not supported");
    Err(settings.refuse("partial_rotary_factor", problem))
}

fn theta(settings: &Settings, default: f64) -> Result<f64> {
    let theta = settings.number_or("rope_theta", default)?;
    if theta.is_finite() && theta > 1.0 {
        return Ok(theta);
    }
    let problem = format!("is {theta}; it must be above 1");
    Err(settings.refuse("rope_theta", problem))
}

/// Reads a rotary embedding from its object of settings.
pub(crate) fn of_object(entry: &Settings, model: &OfModel) -> Result<Rotary> {
    for layer_type in ["full_attention", "sliding_attention"] {
        if entry.has(layer_type) {
            let problem = "has a rotation of its own, which is not supported";
            return Err(entry.refuse(layer_type, problem));
        }
    }
    let partial = entry.optional_positive("partial_rotary_factor")?;
    let dims = (model.head_dim as f64 * partial.unwrap_or(model.partial)) as usize;
    if dims == 0 || dims > model.head_dim || !dims.is_multiple_of(2) {
        let head_dim = model.head_dim;
        let problem = format!("rotates {dims} of {head_dim} dimensions; rotations turn pairs");
        return Err(entry.refuse("partial_rotary_factor", problem));
    }
    Ok(Rotary {
        dims,
        theta: theta(entry, model.theta)?,
        scaling: scaling(entry, model, dims)?,
        max_positions: model.max_positions,
    })
}

fn scaling(entry: &Settings, model: &OfModel, dims: usize) -> Result<RopeScaling> {
    // The older name of `rope_type`; some files have both.
    let older = entry.optional_text("type")?;
    let rope_type = entry
        .optional_text("rope_type")?
        .or(older)
        .unwrap_or("default");
    let need = |key: &str| match entry.optional_positive(key)? {
        Some(number) => Ok(number),
        None => Err(entry.refuse(key, format!("is missing, which `{rope_type}` needs"))),
    };
    let max = model.max_positions;
    let stated = entry.optional_size("original_max_position_embeddings")?;
    let original = model.original.or(stated).unwrap_or(max);
    // The ratio of the positions where no factor is stated.
    let factor_or_ratio = || -> Result<f64> {
        let factor = entry.optional_positive("factor")?;
        Ok(factor.unwrap_or(max as f64 / original as f64))
    };
    match rope_type {
        "default" => Ok(RopeScaling::None),
        "linear" => Ok(RopeScaling::Linear {
            factor: need("factor")?,
        }),
        "dynamic" => Ok(RopeScaling::Dynamic {
            factor: need("factor")?,
        }),
        "llama3" => {
            let low_freq_factor = need("low_freq_factor")?;
            let high_freq_factor = need("high_freq_factor")?;
            if high_freq_factor <= low_freq_factor {
                let problem = format!(
                    "is {high_freq_factor}, which is not above the low_freq_factor {low_freq_factor}"
                );
                return Err(entry.refuse("high_freq_factor", problem));
            }
            Ok(RopeScaling::Llama3 {
                factor: need("factor")?,
                low_freq_factor,
                high_freq_factor,
                original,
            })
        }
        "yarn" => yarn(entry, factor_or_ratio()?, original),
        // `su` is what Phi-3's first files call it.
        "longrope" | "su" => long_rope(entry, factor_or_ratio()?, original, dims),
        other => {
            let problem = format!(
                "is `{other}`; supported: default, linear, dynamic, llama3, yarn, longrope"
            );
            Err(entry.refuse("rope_type", problem))
        }
    }
}

fn yarn(entry: &Settings, factor: f64, original: usize) -> Result<RopeScaling> {
    let magnitude = |scale: f64| {
        if factor <= 1.0 {
            1.0
        } else {
            0.1 * scale * factor.ln() + 1.0
        }
    };
    let mscale = entry.optional_number("mscale")?;
    let scales = mscale.zip(entry.optional_number("mscale_all_dim")?);
    let inferred = match scales.filter(|&(a, b)| a != 0.0 && b != 0.0) {
        Some((mscale, all)) => magnitude(mscale) / magnitude(all),
        None => magnitude(1.0),
    };
    let or = |key: &str, default| -> Result<f64> {
        Ok(entry.optional_positive(key)?.unwrap_or(default))
    };
    let attention_factor = or("attention_factor", inferred)?;
    if !is_positive(attention_factor) {
        let problem = format!("gives the factor {attention_factor} of cosines");
        return Err(entry.refuse("mscale", problem));
    }
    Ok(RopeScaling::Yarn {
        factor,
        attention_factor,
        beta_fast: or("beta_fast", 32.0)?,
        beta_slow: or("beta_slow", 1.0)?,
        original,
        truncate: entry.flag_or("truncate", true)?,
    })
}

fn long_rope(entry: &Settings, factor: f64, original: usize, dims: usize) -> Result<RopeScaling> {
    let factors = |key: &str| {
        let Some(factors) = entry.optional_numbers(key)? else {
            return Err(entry.refuse(key, "is missing, which `longrope` needs"));
        };
        let n = dims / 2;
        if factors.len() != n {
            let problem = format!("has {} numbers for {n} pairs of dimensions", factors.len());
            return Err(entry.refuse(key, problem));
        }
        match factors.iter().find(|&&factor| !is_positive(factor)) {
            Some(factor) => {
                let problem = format!("has {factor}; factors must be positive numbers of f32");
                Err(entry.refuse(key, problem))
            }
            None => Ok(factors),
        }
    };
    let inferred = if factor <= 1.0 {
        1.0
    } else {
        (1.0 + factor.ln() / (original as f64).ln()).sqrt()
    };
    let stated = entry.optional_positive("attention_factor")?;
    let attention_factor = stated.unwrap_or(inferred);
    if !attention_factor.is_finite() {
        let problem = format!("is {original}, of which no factor of cosines can be computed");
        return Err(entry.refuse("original_max_position_embeddings", problem));
    }
    Ok(RopeScaling::LongRope {
        short_factor: factors("short_factor")?,
        long_factor: factors("long_factor")?,
        attention_factor,
        original,
    })
}
