//! The projections of a LLaMA's block, which most later decoders have.

use crate::activation::Activation;
use crate::architecture::{DecoderBlock, Parts};
use crate::attention::{Attention, Heads};
use crate::mlp::GatedMlp;
use crate::source::Source;

/// Lists the norms of a block, as [`parts`](crate::architecture::parts) does, and the projections of a
/// LLaMA's, from the fields of its attention and of its MLP.
macro_rules! gated_parts {
    (
        $config:ident => $llama:expr,
        attention: $($attention:ident).+,
        mlp: $mlp:ident,
        norms: $($norms:tt)+
    ) => {
        $crate::architecture::parts! {
            $config =>
            norms: $($norms)+
            projections:
                0 "self_attn.q_proj" $($attention).+.q_proj
                    [$llama.hidden_size, $llama.query_width()], bias $llama.attention_bias,
                0 "self_attn.k_proj" $($attention).+.k_proj
                    [$llama.hidden_size, $llama.key_width()], bias $llama.attention_bias,
                0 "self_attn.v_proj" $($attention).+.v_proj
                    [$llama.hidden_size, $llama.key_width()], bias $llama.attention_bias,
                1 "self_attn.o_proj" $($attention).+.o_proj
                    [$llama.query_width(), $llama.hidden_size], bias $llama.attention_output_bias,
                2 "mlp.gate_proj" $mlp.gate_proj
                    [$llama.hidden_size, $llama.intermediate_size], bias $llama.mlp_bias,
                2 "mlp.up_proj" $mlp.up_proj
                    [$llama.hidden_size, $llama.intermediate_size], bias $llama.mlp_bias,
                3 "mlp.down_proj" $mlp.down_proj
                    [$llama.intermediate_size, $llama.hidden_size], bias $llama.mlp_bias,
        }
    };
}

pub(super) use gated_parts;

impl<B: DecoderBlock, S: Source> Parts<'_, B, S> {
    /// The attention and the MLP of [`gated_parts`].
    ///
    /// # Panics
    /// If the projections are others.
    pub(super) fn attention_and_mlp(
        &mut self,
        heads: Heads,
        activation: Activation,
    ) -> Result<(Attention, GatedMlp), S::Error> {
        let [
            q_proj,
            k_proj,
            v_proj,
            o_proj,
            gate_proj,
            up_proj,
            down_proj,
        ] = self.linears()?;
        let attention = Attention {
            q_proj,
            k_proj,
            v_proj,
            o_proj,
            heads,
        };
        let mlp = GatedMlp {
            gate_proj,
            up_proj,
            down_proj,
            activation,
        };
        Ok((attention, mlp))
    }
}
