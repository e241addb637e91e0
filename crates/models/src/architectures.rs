//! The architectures: each has a file, a line in the list and a `mod`.

mod gated;
mod gemma2;
mod gemma3;
mod gpt_neo;
mod gptj;
mod layer_attention;
mod llama;
mod olmo2;
mod opt;
mod phi3;
mod qwen3;

pub use gemma2::Gemma2Config;
pub use gemma3::Gemma3Config;
pub use gpt_neo::GptNeoConfig;
pub use gptj::GptJConfig;
pub use layer_attention::LayerAttention;
pub use llama::LlamaConfig;
pub use olmo2::Olmo2Config;
pub use opt::OptConfig;
pub use phi3::Phi3Config;
pub use qwen3::Qwen3Config;

/// Calls a macro with its arguments in brackets and, for each architecture, the name of its case, its
/// configuration.
macro_rules! architectures {
    ($macro:ident $($arguments:tt)*) => {
        $macro! {
            [$($arguments)*]
            /// LLaMA, Mistral, Qwen2, SmolLM3.
            Llama $crate::LlamaConfig;
            /// OPT.
            Opt $crate::OptConfig;
            /// Qwen3.
            Qwen3 $crate::Qwen3Config;
            /// Gemma 2.
            Gemma2 $crate::Gemma2Config;
            /// The decoder of text of Gemma 3.
            Gemma3 $crate::Gemma3Config;
            /// Phi-3 and Phi-4-mini.
            Phi3 $crate::Phi3Config;
            /// GPT-Neo.
            GptNeo $crate::GptNeoConfig;
            /// GPT-J.
            GptJ $crate::GptJConfig;
            /// OLMo 2.
            Olmo2 $crate::Olmo2Config;
        }
    };
}

pub(crate) use architectures;
