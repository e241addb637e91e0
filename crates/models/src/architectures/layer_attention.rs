use crate::Result;
use crate::settings::Settings;

/// What the attention of one layer reads, of models whose layers differ in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LayerAttention {
    /// Whether tokens attend to the last `sliding_window` tokens alone.
    pub has_window: bool,
    /// Whether queries and keys are rotated.
    pub has_rope: bool,
}

impl LayerAttention {
    /// Attention to all tokens before, with rotated queries and keys.
    pub const FULL: Self = Self {
        has_window: false,
        has_rope: true,
    };

    /// Attention to a window, with rotated queries and keys.
    pub const SLIDING: Self = Self {
        has_window: true,
        has_rope: true,
    };

    /// Rotating layers that have a window or not.
    pub(crate) fn sliding(has_window: bool) -> Self {
        if has_window {
            Self::SLIDING
        } else {
            Self::FULL
        }
    }

    /// The name in `layer_types`.
    pub(crate) fn name(self) -> &'static str {
        if self.has_window {
            "sliding_attention"
        } else {
            "full_attention"
        }
    }
}

/// Whether each layer has a window, as `layer_types` has it, if it is there.
pub(crate) fn layer_types(settings: &Settings, n_layers: usize) -> Result<Option<Vec<bool>>> {
    const KEY: &str = "layer_types";
    let Some(names) = settings.optional_texts(KEY)? else {
        return Ok(None);
    };
    if names.len() != n_layers {
        let problem = format!("has {} layers, and the model {n_layers}", names.len());
        return Err(settings.refuse(KEY, problem));
    }
    let has_window = |name: &str| match name {
        "full_attention" => Ok(false),
        "sliding_attention" => Ok(true),
        other => {
            let problem = format!("has `{other}`; supported: full_attention, sliding_attention");
            Err(settings.refuse(KEY, problem))
        }
    };
    let all = names.into_iter().map(has_window);
    all.collect::<Result<_>>().map(Some)
}

/// Refuses a layer with a window where no size is stated.
pub(crate) fn check_window(
    settings: &Settings,
    window: Option<usize>,
    layers: &[LayerAttention],
) -> Result<()> {
    if window.is_some() || layers.iter().all(|layer| !layer.has_window) {
        return Ok(());
    }
    let problem = "is not set, and there are layers of `sliding_attention`";
    Err(settings.refuse("sliding_window", problem))
}
